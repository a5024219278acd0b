//! What Choria's nodes publish: registration data in both versions of the protocol, in the form of the wire.

use base64::{Engine as _, engine::general_purpose::STANDARD};

/// Subject of registration data in the collective `choria`.
pub const REGISTRATION: &str = "choria.broadcast.agent.registration";

/// A registration of one node, without a signature: adapters do not verify signatures by default.
#[derive(Debug, Clone, Copy)]
pub struct Registration<'a> {
    /// Request id, 32 characters.
    pub id: &'a str,
    pub sender: &'a str,
    /// What the node says about itself.
    pub data: &'a str,
    /// When it said that, in ns since 1970.
    pub time: i64,
}

impl Registration<'_> {
    /// As a node of a site with certificates publishes it.
    pub fn v1(&self) -> String {
        let (id, sender, message) = (text(self.id), text(self.sender), text(self.data));
        let (caller, time) = (text(&format!("choria={}", self.sender)), self.time / 1_000_000_000);
        let request = format!(
            r#"{{"protocol":"choria:request:1","message":{message},"envelope":{{"requestid":{id},"senderid":{sender},"callerid":{caller},"collective":"choria","agent":"registration","ttl":60,"time":{time},"filter":{{"fact":[],"cf_class":[],"agent":[],"identity":[],"compound":[]}}}}}}"#
        );
        let secure = format!(
            r#"{{"protocol":"choria:secure:request:1","message":{},"signature":"aW5zZWN1cmUgcmVnaXN0cmF0aW9u","pubcert":"insecure registration"}}"#,
            text(&request)
        );
        let data = STANDARD.encode(secure);
        format!(
            r#"{{"protocol":"choria:transport:1","data":"{data}","headers":{{"reply-to":"dev.null","mc_sender":{sender},"seen-by":[["nats://broker.example.net:4222",{sender},"nats://broker.example.net:4222"]]}}}}"#
        )
    }

    /// As a node of a site with tokens publishes it.
    pub fn v2(&self) -> String {
        let (id, sender, time) = (text(self.id), text(self.sender), self.time);
        let message = STANDARD.encode(self.data);
        let request = format!(
            r#"{{"protocol":"io.choria.protocol.v2.request","message":"{message}","id":{id},"sender":{sender},"caller":{sender},"collective":"choria","agent":"registration","ttl":60,"time":{time}}}"#
        );
        let request = STANDARD.encode(request);
        let secure = format!(
            r#"{{"protocol":"io.choria.protocol.v2.secure_request","request":"{request}","signature":"aW5zZWN1cmU=","caller":"insecure"}}"#
        );
        let data = STANDARD.encode(secure);
        format!(
            r#"{{"protocol":"io.choria.protocol.v2.transport","data":"{data}","headers":{{"reply":"dev.null","sender":{sender}}}}}"#
        )
    }
}

fn text(value: &str) -> String {
    serde_json::Value::from(value).to_string()
}
