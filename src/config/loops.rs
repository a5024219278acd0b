//! Loop protection: how messages are recognised that have been in the target stream before. Pure.

use serde::{Deserialize, Serialize};

use super::FeedSubjects;

/// The copies of one replication, or of all replications of a site, from one stream: as their provenance headers name it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OriginTag {
    /// The stream that they were copied from.
    pub stream: String,
    /// The site that copied them.
    pub site: String,
    /// Name of the replication; `None` for any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What `Nats-Stream-Source` begins with in messages that a feed of kind `source` gave to the target's server; `None` for
    /// copies, which have a provenance header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fed: Option<String>,
}

/// What counts as copied from the target stream, beside the copies of replications that read it in the same group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoopProtection {
    /// Copies that other groups make of the target stream.
    pub target_origin: Vec<OriginTag>,
}

impl OriginTag {
    /// Those that a feed of kind `source` takes from a stream.
    pub fn fed(stream: &str, site: &str, id: &str) -> Self {
        let fed = Some(FeedSubjects::of(site, id).source_index(stream));
        Self { stream: stream.to_owned(), site: site.to_owned(), name: Some(id.to_owned()), fed }
    }

    /// The same for feeds: the name is the id of one, or what it has as `name`, or it has neither.
    pub fn as_fed(&self) -> Vec<Self> {
        let Self { stream, site, name, .. } = self;
        let named = name.iter().flat_map(|name| [name.clone(), format!("{stream}.{name}")]);
        let all = named.chain(name.is_none().then(|| stream.clone()));
        all.map(|id| Self::fed(stream, site, &id)).collect()
    }

    /// Whether what carries the other one carries this one.
    pub fn includes(&self, other: &Self) -> bool {
        let is_name = self.name.is_none() || self.name == other.name;
        is_name && self.fed == other.fed && self.stream == other.stream && self.site == other.site
    }

    /// `SITE` or `SITE NAME`, for copies of a stream.
    pub(super) fn parse(text: &str, stream: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let (site, name) = (words.next()?, words.next());
        let is_word = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_graphic());
        if !is_word(site) || !name.is_none_or(is_word) || words.next().is_some() {
            return None;
        }
        Some(Self { stream: stream.to_owned(), site: site.to_owned(), name: name.map(str::to_owned), fed: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_a_site_or_one_of_its_replications() {
        let check = |text: &str, expect: Option<(&str, Option<&str>)>| {
            let tag = |(site, name): (&str, Option<&str>)| OriginTag {
                stream: "S".to_owned(),
                site: site.to_owned(),
                name: name.map(str::to_owned),
                fed: None,
            };
            assert_eq!(OriginTag::parse(text, "S"), expect.map(tag), "{text}");
        };
        check("EAST", Some(("EAST", None)));
        check("EAST w1", Some(("EAST", Some("w1"))));
        for wrong in ["", " ", "EAST ", " EAST", "EAST  w1", "EAST w1 x", "EAST\tw1", "Süd"] {
            check(wrong, None);
        }
    }
}
