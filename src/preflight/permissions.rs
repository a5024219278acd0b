//! What a user may do, by the answer to `$SYS.REQ.USER.INFO`. Pure. Servers from 2.10 to 2.15 answer it for every
//! account, with `permissions` only where there are any; whoever may publish to listed subjects only has to be
//! allowed to ask.

use serde::Deserialize;

use super::subjects::{Share, share};
use crate::config::patterns::intersection;

/// What a user may do; everything by default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Permissions {
    publish: PermissionRules,
    subscribe: PermissionRules,
}

/// An empty `allow` allows everything; `deny` wins.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct PermissionRules {
    allow: Vec<String>,
    deny: Vec<String>,
}

impl PermissionRules {
    fn share(&self, subject: &str) -> Share {
        let allowed = if self.allow.is_empty() { Share::All } else { share(&self.allow, subject) };
        match share(&self.deny, subject) {
            Share::All => Share::None,
            // The denied part may be another one than the allowed part. That is rare and only warns too often.
            Share::Part => allowed.min(Share::Part),
            Share::None => allowed,
        }
    }
}

impl Permissions {
    /// Reads the answer of a server.
    pub(crate) fn parse(answer: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct PermissionAnswer {
            data: User,
        }
        #[derive(Deserialize)]
        struct User {
            #[serde(default)]
            permissions: Option<Permissions>,
        }
        Some(serde_json::from_slice::<PermissionAnswer>(answer).ok()?.data.permissions.unwrap_or_default())
    }

    /// Whether an answer is from the server with this id. Over leafnodes and routes other servers are asked too, and each
    /// answers with the permissions of the connection over which it was asked.
    pub(crate) fn are_from(answer: &[u8], server_id: &str) -> bool {
        #[derive(Deserialize)]
        struct SystemAnswer {
            server: Server,
        }
        #[derive(Deserialize)]
        struct Server {
            id: String,
        }
        serde_json::from_slice::<SystemAnswer>(answer).is_ok_and(|answer| answer.server.id == server_id)
    }

    /// How much of a subject the user may publish to.
    pub(crate) fn publish(&self, subject: &str) -> Share {
        self.publish.share(subject)
    }

    /// Whether the user may subscribe to what comes back to us, on subjects that begin so.
    pub(super) fn may_listen(&self, inbox_prefix: &str) -> bool {
        // The subject may be followed by a queue group; ours has none.
        let plain = |list: &[String]| -> Vec<String> {
            list.iter().filter_map(|rule| rule.split(' ').next().map(str::to_owned)).collect()
        };
        let PermissionRules { allow, deny } = &self.subscribe;
        let inbox = &format!("{inbox_prefix}.*.>");
        let allowed = allow.is_empty() || share(&plain(allow), inbox) == Share::All;
        allowed && plain(deny).iter().all(|rule| intersection(rule, inbox).is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_user_may_publish() {
        let check = |permissions: &str, subject: &str, expect| {
            let answer = format!(r#"{{"server":{{}},"data":{{"user":"u","account":"A"{permissions}}}}}"#);
            let permissions = Permissions::parse(answer.as_bytes()).unwrap();
            assert_eq!(permissions.publish(subject), expect, "{answer} {subject}");
        };
        check("", "a.>", Share::All);
        check(r#","permissions":{"publish":{"deny":["a.>"]},"subscribe":{}}"#, "a.b", Share::None);
        check(r#","permissions":{"publish":{"deny":["a.b"]},"subscribe":{}}"#, "a.>", Share::Part);
        check(r#","permissions":{"publish":{"allow":["a.\u003e"],"deny":["a.b.>"]}}"#, "a.c", Share::All);
        check(r#","permissions":{"publish":{"allow":["a.c"]}}"#, "a.>", Share::Part);
        check(r#","permissions":{"publish":{"allow":["a.c"]}}"#, "b", Share::None);
        check(r#","permissions":{"subscribe":{"deny":["b"]}}"#, "b", Share::All);
    }

    #[test]
    fn an_answer_names_its_server() {
        let answer = br#"{"server":{"name":"a","id":"A"},"data":{"user":"u"}}"#;
        assert!(Permissions::are_from(answer, "A"));
        assert!(!Permissions::are_from(answer, "B"));
        assert!(!Permissions::are_from(b"{}", "A"));
    }

    #[test]
    fn what_a_user_may_hear() {
        let check = |subscribe: &str, expect| {
            let answer = format!(r#"{{"data":{{"permissions":{{"subscribe":{subscribe}}}}}}}"#);
            assert_eq!(Permissions::parse(answer.as_bytes()).unwrap().may_listen("_INBOX"), expect, "{answer}");
        };
        check("{}", true);
        check(r#"{"allow":["_INBOX.>"]}"#, true);
        check(r#"{"allow":["_INBOX.mine.>"]}"#, false);
        check(r#"{"deny":["_INBOX.x.>"]}"#, false);
        check(r#"{"deny":["orders.> q"]}"#, true);
        let mine = Permissions::parse(br#"{"data":{"permissions":{"subscribe":{"allow":["_INBOX.mine.>"]}}}}"#);
        assert!(mine.unwrap().may_listen("_INBOX.mine"));
    }

    #[test]
    fn what_is_no_answer_tells_nothing() {
        for answer in ["", "{}", "NATS/1.0 503"] {
            assert_eq!(Permissions::parse(answer.as_bytes()), None);
        }
    }
}
