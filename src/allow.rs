//! What the operator allows documents to name: servers, and files on this machine. Judged when a document is read
//! and again before every connection, because contexts and links change.

use std::{
    fmt,
    net::IpAddr,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use futures_util::{FutureExt, future::BoxFuture};
use nats_lane::{
    Auth, Connection, ContextFields, Dial, Endpoint, Error, Host, Lane, Scheme, ServerRef, auth, context,
    leafnode::{Leaf, LeafLogin, LeafServer},
};
use serde_json::Value;
use wildmatch::WildMatch;

use crate::config::{self, Adapter, AdapterSide, Former, Heartbeats, Json, Problem, Problems, Replication, UsableLink};

/// Allows everything by default; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct AllowList(Arc<Lists>, Arc<[String]>);

#[derive(Debug, Default)]
struct Lists {
    /// Empty for any.
    urls: Vec<UrlPattern>,
    /// Folders without links in their paths; empty for any.
    credentials: Vec<PathBuf>,
}

impl Dial for AllowList {
    fn dial<'a>(&'a self, server: &'a ServerRef, name: &'a str) -> BoxFuture<'a, Result<Lane, Error>> {
        async move { Lane::connect(&self.resolve(server)?, name).await }.boxed()
    }

    fn dial_leaf<'a>(&'a self, server: &'a ServerRef, login: &'a LeafLogin) -> BoxFuture<'a, Result<Leaf, Error>> {
        async move { Leaf::connect(&self.resolve(server)?, login).await }.boxed()
    }

    fn dial_other_leaf<'a>(
        &'a self,
        server: &'a ServerRef,
        login: &'a LeafLogin,
        connected: &'a [LeafServer],
    ) -> BoxFuture<'a, Result<Option<Leaf>, Error>> {
        async move { Leaf::connect_other(&self.resolve(server)?, login, connected).await }.boxed()
    }

    fn login_expires(&self, server: &ServerRef) -> Option<i64> {
        auth::login_expires(&self.resolve(server).ok()?.endpoint.auth)
    }
}

/// `[scheme://]host[:port]` with `*` for any text; in a host as [`host_matches`] has it.
#[derive(Debug)]
struct UrlPattern {
    written: String,
    scheme: WildMatch,
    /// In lower case.
    host: String,
    port: WildMatch,
}

/// Something that the list does not allow.
#[derive(Debug)]
struct Breach {
    setting: Setting,
    message: String,
}

/// What of a side it is.
#[derive(Debug, Clone, Copy)]
enum Setting {
    /// The URL, or the context where there is one.
    Server,
    /// One of the TLS files.
    Tls(&'static str),
    /// One of the files of an identity of Choria's.
    Choria(&'static str),
}

impl AllowList {
    /// Servers by patterns, files by folders; an empty list allows any.
    pub fn new(urls: &[String], credentials: &[PathBuf]) -> Result<Self, String> {
        let urls = urls.iter().map(|url| UrlPattern::parse(url).map_err(|e| format!("`--allow-url {url}`: {e}")));
        let folder = |folder: &PathBuf| {
            let found = folder.canonicalize().and_then(|path| path.read_dir().map(|_| path));
            found.map_err(|error| format!("`--allow-credentials {}`: {error}", folder.display()))
        };
        let credentials = credentials.iter().map(folder).collect::<Result<_, _>>()?;
        let lists = Lists { urls: urls.collect::<Result<_, _>>()?, credentials };
        Ok(Self(Arc::new(lists), Arc::default()))
    }

    /// The same for a site that had other names before: replications know what their copies were made under.
    #[must_use]
    pub fn with_former(self, sites: &[String]) -> Self {
        Self(self.0, sites.into())
    }

    /// Whether any server may be named, or any file.
    pub fn is_open(&self) -> bool {
        self.0.urls.is_empty() || self.0.credentials.is_empty()
    }

    /// [`config::parse`] under this list.
    pub fn parse(&self, json: &[u8], site: &str) -> Result<Replication, Problems> {
        let json = Json::read(json).map_err(Problems::bounded)?;
        let result = self.parse_value(&json.value, site);
        json.checked(result).map_err(Problems::bounded)
    }

    /// [`config::parse_value`] under this list.
    pub fn parse_value(&self, value: &Value, site: &str) -> Result<Replication, Problems> {
        let mut replication = config::parse_judged(value, site, |side, server| self.problems(side, server, value))?;
        let default = replication.name == site;
        let former = self.1.iter().map(|former| Former {
            site: former.clone(),
            name: if default { former.clone() } else { replication.name.clone() },
        });
        replication.former = former.collect();
        Ok(replication)
    }

    /// [`config::parse_heartbeats`] under this list.
    pub fn parse_heartbeats(&self, value: &Value) -> Result<Option<Heartbeats>, Problems> {
        config::parse_heartbeats(value, |server| {
            let breaches = self.breaches(server, context::resolve(server).ok().as_ref()).into_iter();
            let problem = |Breach { setting, message }| {
                let path = match setting {
                    Setting::Server => "/url".to_owned(),
                    Setting::Tls(file) => format!("/tls/{file}"),
                    Setting::Choria(file) => format!("/choria/{file}"),
                };
                Problem::new(path, message)
            };
            breaches.map(problem).collect()
        })
    }

    /// [`config::parse_adapter`] under this list.
    pub fn parse_adapter(&self, value: &Value) -> Result<Adapter, Problems> {
        config::parse_adapter(value, |side, server| self.adapter_problems(side, server))
    }

    /// [`config::parse_link`] under this list. `key` is the name that the key of the document has.
    pub fn parse_link(&self, value: &Value, key: Option<&str>) -> Result<UsableLink, Problems> {
        config::parse_link(value, key, |side, server| self.problems(side, server, value))
    }

    fn adapter_problems(&self, side: AdapterSide, server: &ServerRef) -> Vec<Problem> {
        let field = side.name();
        let breaches = self.breaches(server, context::resolve(server).ok().as_ref()).into_iter();
        let problem = |Breach { setting, message }| {
            let path = match (setting, server) {
                (Setting::Server, ServerRef::Known(_)) => format!("/{field}/servers"),
                (Setting::Server, ServerRef::Context { .. }) => format!("/{field}/context"),
                (Setting::Tls(file), _) => format!("/{field}/tls/{file}"),
                (Setting::Choria(file), _) => format!("/{field}/choria/{file}"),
            };
            Problem::new(path, message)
        };
        breaches.map(problem).collect()
    }

    /// Everything that a connection needs, if it is allowed; the file of a context is read now.
    pub fn resolve(&self, server: &ServerRef) -> Result<Connection, Error> {
        let connection = context::resolve(server)?;
        match self.breaches(server, Some(&connection)).into_iter().next() {
            Some(breach) => Err(Error::hold(breach.message)),
            None => Ok(connection),
        }
    }

    fn problems(&self, side: &str, server: &ServerRef, document: &Value) -> Vec<Problem> {
        // A context that cannot be read now is judged before a connection is made.
        let connection = context::resolve(server).ok();
        let breaches = self.breaches(server, connection.as_ref()).into_iter();
        let field = |setting| match (setting, server) {
            (Setting::Server, ServerRef::Known(_)) => format!("{side}_url"),
            (Setting::Server, ServerRef::Context { .. }) => format!("{side}_context"),
            (Setting::Tls(file), _) => {
                // Without TLS settings of its own, a leafnode port has those of its side.
                let side_of_leaf = side.strip_suffix("_leaf").unwrap_or(side);
                let own = [format!("{side}_tls"), format!("{side_of_leaf}_tls")];
                let tls = own.iter().find(|own| document[own.as_str()][file].is_string());
                format!("{}/{file}", tls.map_or("tls", String::as_str))
            }
            (Setting::Choria(file), _) => {
                let own = format!("{side}_choria");
                let choria = if document[&own].is_object() { own.as_str() } else { "choria" };
                format!("{choria}/{file}")
            }
        };
        breaches.map(|Breach { setting, message }| Problem::new(format!("/{}", field(setting)), message)).collect()
    }

    fn breaches(&self, server: &ServerRef, connection: Option<&Connection>) -> Vec<Breach> {
        let servers = connection.map(|connection| self.servers(&connection.endpoint)).unwrap_or_default();
        let mut files: Vec<(Setting, PathBuf)> = Vec::new();
        match server {
            ServerRef::Known(known) => {
                let Endpoint { auth, tls, .. } = &known.endpoint;
                files.extend(identity_files(auth).into_iter().map(|file| (Setting::Server, file.clone())));
                files.extend(choria_files(auth));
                files.extend(tls_files(&tls.ca, &tls.cert, &tls.key));
            }
            // What the context itself names is the operator's own choice.
            ServerRef::Context { name, over, under } => {
                files.extend(context::file(name).map(|file| (Setting::Server, file)));
                for ContextFields { ca, cert, key, .. } in [over.as_ref(), under.as_ref()] {
                    files.extend(tls_files(ca, cert, key));
                }
            }
        }
        let files = files.into_iter().filter_map(|(setting, file)| self.file(setting, &file));
        servers.into_iter().chain(files).collect()
    }

    fn servers(&self, endpoint: &Endpoint) -> Vec<Breach> {
        let urls = &self.0.urls;
        let allowed = |host: &&Host| urls.is_empty() || urls.iter().any(|url| url.matches(endpoint.scheme, host));
        let refused = endpoint.hosts.iter().filter(|host| !allowed(host));
        let breach = |host| {
            let message = format!(
                "server `{}://{host}` is not allowed by this service; allowed are {}",
                endpoint.scheme.name(),
                list(urls.iter().map(|url| &url.written))
            );
            Breach { setting: Setting::Server, message }
        };
        refused.map(breach).collect()
    }

    fn file(&self, setting: Setting, file: &Path) -> Option<Breach> {
        let folders = &self.0.credentials;
        let below = |path: PathBuf| folders.iter().any(|folder| path.starts_with(folder));
        if folders.is_empty() || real_path(file).is_some_and(below) {
            return None;
        }
        let allowed = list(folders.iter().map(|folder| folder.display()));
        let file = file.display();
        let message = format!("file `{file}` is not allowed by this service; allowed are files below {allowed}");
        Some(Breach { setting, message })
    }
}

fn identity_files(auth: &Auth) -> Vec<&PathBuf> {
    match auth {
        Auth::CredentialsFile(file) => vec![file],
        Auth::NkeyFile { seed, jwt } => std::iter::once(seed).chain(jwt).collect(),
        Auth::Anonymous | Auth::UserPassword { .. } | Auth::Token(_) | Auth::Jwt { .. } | Auth::Custom(_) => Vec::new(),
    }
}

fn choria_files(auth: &Auth) -> Vec<(Setting, PathBuf)> {
    let Auth::Custom(identity) = auth else { return Vec::new() };
    identity.files().into_iter().map(|(name, file)| (Setting::Choria(name), file.to_owned())).collect()
}

fn tls_files(
    ca: &Option<PathBuf>,
    cert: &Option<PathBuf>,
    key: &Option<PathBuf>,
) -> impl Iterator<Item = (Setting, PathBuf)> {
    let files =
        [("ca", ca), ("cert", cert), ("key", key)].map(|(name, file)| file.clone().map(|f| (Setting::Tls(name), f)));
    files.into_iter().flatten()
}

fn list(items: impl Iterator<Item = impl fmt::Display>) -> String {
    items.map(|item| format!("`{item}`")).collect::<Vec<_>>().join(", ")
}

/// Where a file really lies, links and `..` resolved. One that is not there yet is judged by the nearest folder that
/// is; `None` where that leads nowhere.
fn real_path(file: &Path) -> Option<PathBuf> {
    let mut missing = Vec::new();
    let mut there = std::path::absolute(file).ok()?;
    loop {
        match there.canonicalize() {
            Ok(real) => return Some(missing.iter().rev().fold(real, |path, name| path.join(name))),
            // A link to what is not there may lead anywhere later.
            Err(_) if there.is_symlink() => return None,
            Err(_) => match there.components().next_back()? {
                Component::Normal(name) => missing.push(name.to_owned()),
                _ => return None,
            },
        }
        there.pop();
    }
}

impl UrlPattern {
    fn parse(written: &str) -> Result<Self, &'static str> {
        let (scheme, rest) = written.split_once("://").unwrap_or(("*", written));
        let (host, port) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or("the `[` of an IPv6 address is not closed")?;
                (host, port.strip_prefix(':').or_else(|| port.is_empty().then_some("*")))
            }
            None => rest.split_once(':').map_or((rest, Some("*")), |(host, port)| (host, Some(port))),
        };
        let port = port.filter(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit() || b == b'*'));
        let port = port.ok_or("the port is neither a number nor `*`")?;
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"*-._:".contains(&byte);
        if host.is_empty() || !host.bytes().all(legal) {
            return Err("it is not `scheme://host:port` with `*` for any text, such as `nats://*.example.net:4222`");
        }
        let schemes = [Scheme::Nats, Scheme::Tls, Scheme::Ws, Scheme::Wss, Scheme::Leaf];
        let scheme = WildMatch::new(&scheme.to_ascii_lowercase());
        if !schemes.iter().any(|known| scheme.matches(known.name())) {
            return Err("its scheme is none of `nats`, `tls`, `ws`, `wss` and `nats-leaf`");
        }
        Ok(Self { written: written.to_owned(), scheme, host: host.to_ascii_lowercase(), port: WildMatch::new(port) })
    }

    fn matches(&self, scheme: Scheme, host: &Host) -> bool {
        let name = host.host.to_ascii_lowercase();
        self.scheme.matches(scheme.name())
            && host_matches(&self.host, name.strip_suffix('.').unwrap_or(&name))
            && self.port.matches(&host.port.to_string())
    }
}

/// Whether a pattern matches a host. In an address `*` is any text. The end of a name says which owner it has, and every
/// owner can make names with that end: so in a name `*` is any text only at the beginning, and text without dots elsewhere;
/// and a pattern of digits and dots matches no name.
fn host_matches(pattern: &str, host: &str) -> bool {
    if host.parse::<IpAddr>().is_ok() {
        return WildMatch::new(pattern).matches(host);
    }
    let of_address = |c: char| "*.".contains(c) || c.is_ascii_digit();
    if pattern.contains(|c: char| c.is_ascii_digit()) && pattern.chars().all(of_address) {
        return false;
    }
    match pattern.strip_prefix('*') {
        Some(end) => host.char_indices().any(|(at, _)| labels_match(end, &host[at..])) || labels_match(end, ""),
        None => labels_match(pattern, host),
    }
}

fn labels_match(pattern: &str, host: &str) -> bool {
    let (patterns, labels) = (pattern.split('.'), host.split('.'));
    patterns.clone().count() == labels.clone().count()
        && patterns.zip(labels).all(|(pattern, label)| WildMatch::new(pattern).matches(label))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use serde_json::json;

    use super::*;

    #[test]
    fn patterns_of_servers() {
        let check = |pattern: &str, url: &str, expect: bool| {
            let (pattern, endpoint) = (UrlPattern::parse(pattern).unwrap(), Endpoint::parse(url).unwrap());
            let matches = pattern.matches(endpoint.scheme, &endpoint.hosts[0]);
            assert_eq!(matches, expect, "{pattern:?} {url}");
        };
        check("nats://*.example.net:4222", "nats://a.example.net", true);
        check("nats://*.example.net:4222", "nats://A.b.Example.NET.:4222", true);
        check("nats://*.example.net:4222", "nats://a.example.net:4223", false);
        check("nats://*.example.net:4222", "tls://a.example.net", false);
        check("nats://*.example.net:4222", "nats://example.net", false);
        check("*.example.net", "wss://a.example.net:9", true);
        check("*.example.net", "a.example.net.evil.org", false);
        check("*.example.net", "nats://u:p@evil.org?connect_timeout=1s", false);
        check("tls://h", "tls://h:1", true);
        check("ws*://h:*", "wss://h", true);
        check("[::1]:4222", "nats://[::1]", true);
        check("[::*]", "nats://[::1]:5", true);
        check("*", "ws://anything/path", true);
        // The end of a name says which owner it has.
        check("10.0.*", "10.0.3.7", true);
        check("10.0.*:*", "10.0.3.7:9", true);
        check("10.0.*", "10.0.evil.org", false);
        check("10.*.*.*", "10.0.0.evil", false);
        check("10.0.0.1", "10.0.0.1", true);
        check("[fd00:*]", "[fd00::7]", true);
        check("nats-*", "nats-1", true);
        check("nats-*", "nats-1.evil.org", false);
        check("nats.*", "nats.evil.org", false);
        check("*.example.*", "a.example.evil.org", false);
        check("*.east-*.example.net", "a.b.east-1.example.net", true);
        check("*example.net", "example.net", true);
        check("n*.example.net", "n.evil.example.net", false);
        check("*.*", "a.b", true);
        check("**", "a.b", true);
        for bad in ["", "nats://", "h:x", "h:", "[::1", "[::1]x", "u@h", "http://h", "h/path", "a,b"] {
            assert!(UrlPattern::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_server_and_every_file_of_a_document_is_judged() {
        let folder = tempfile::tempdir().unwrap();
        let (inside, outside) = (folder.path().join("in"), folder.path().join("out"));
        fs::create_dir(&inside).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("x"), "").unwrap();
        fs::write(inside.join("x"), "").unwrap();
        symlink(outside.join("x"), inside.join("link")).unwrap();
        symlink(outside.join("nothing"), inside.join("dangling")).unwrap();
        symlink(&outside, inside.join("folder")).unwrap();
        symlink(&inside, folder.path().join("in-too")).unwrap();
        let rules = AllowList::new(&["*.good".to_owned()], std::slice::from_ref(&inside)).unwrap();
        let root = folder.path().display();
        let check = |fields: Value, expect: &[(&str, &str)]| {
            let mut document = json!({"stream": "S", "source_url": "a.good", "target_url": "b.good"});
            for (name, value) in fields.as_object().unwrap() {
                document[name] = value.clone();
            }
            let found = rules.parse_value(&document, "SITE").err().map(|problems| problems.0).unwrap_or_default();
            let paths: Vec<_> = found.iter().map(|problem| problem.path.as_str()).collect();
            assert_eq!(paths, expect.iter().map(|(path, _)| *path).collect::<Vec<_>>(), "{document} {found:?}");
            for (problem, (_, text)) in found.iter().zip(expect) {
                assert!(problem.message.contains(text), "{found:?}");
            }
        };
        check(json!({}), &[]);
        check(
            json!({"source_url": "nats://a.good,b.bad", "target_url": "ws://c.bad"}),
            &[
                ("/source_url", "server `nats://b.bad:4222` is not allowed by this service; allowed are `*.good`"),
                ("/target_url", "server `ws://c.bad:80`"),
            ],
        );
        check(
            json!({"source_url": "b.bad", "max_age": "soon", "target_url": "c.bad:x", "stream": ""}),
            &[
                ("/max_age", "not a duration"),
                ("/source_url", "server `nats://b.bad:4222` is not allowed"),
                ("/stream", "`stream`"),
                ("/target_url", "port"),
            ],
        );
        let credentials = |path: &str| json!({"source_url": format!("a.good?credentials={root}/{path}")});
        for good in ["in/x", "in/later", "in/a/later", "in-too/x", "out/../in/x"] {
            check(credentials(good), &[]);
        }
        for bad in ["out/x", "in/../out/x", "in/link", "in/dangling", "in/folder/x", "in/folder/later", "later"] {
            check(credentials(bad), &[("/source_url", "allowed are files below")]);
        }
        check(
            json!({"tls": {"ca": format!("{root}/out/x")}, "source_tls": {"cert": "/etc/c", "key": format!("{root}/in/x")}}),
            &[("/source_tls/cert", "file `/etc/c`"), ("/tls/ca", "out/x")],
        );
        check(json!({"source_url": format!("a.good?nkey={root}/in/x&jwt={root}/out/x")}), &[("/source_url", "out/x")]);
        check(json!({"source_url": "", "source_context": "hub"}), &[("/source_context", "hub.json` is not allowed")]);
        let leaf = |url: &str, tls: &str| json!({"kind": "mirror", "target_leaf_url": url, tls: {"ca": format!("{root}/out/x")}});
        let server = ("/target_leaf_url", "server `nats-leaf://c.bad:7422` is not allowed");
        check(leaf("nats-leaf://c.bad", "target_leaf_tls"), &[("/target_leaf_tls/ca", "out/x"), server]);
        check(leaf("nats-leaf://c.good", "target_tls"), &[("/target_tls/ca", "out/x")]);
    }

    #[test]
    fn rules_that_make_no_sense_are_refused() {
        let error = AllowList::new(&["http://h".to_owned()], &[]).unwrap_err();
        assert!(error.starts_with("`--allow-url http://h`: "), "{error}");
        let error = AllowList::new(&[], &["/there/is/none".into()]).unwrap_err();
        assert!(error.starts_with("`--allow-credentials /there/is/none`: "), "{error}");
        assert!(AllowList::default().is_open());
    }
}
