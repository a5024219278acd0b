//! Who sent a message, where an adapter verifies that: second version only, whose messages have an ed25519 signature and the token
//! of the sender. The token has to be signed by a trusted key, and the sender has to be the identity in it.
//!
//! Requests that another service signed for the caller (`signer`) are not accepted, nor tokens of chain issuers.

use base64::{Engine as _, engine::general_purpose::STANDARD, engine::general_purpose::URL_SAFE_NO_PAD};
use nkeys::KeyPair;
use serde::Deserialize;

/// Keys that sign the tokens of nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedSigners {
    /// Public keys as NATS writes them.
    keys: Vec<String>,
}

/// The claims that matter.
#[derive(Debug, Deserialize)]
struct SenderClaims {
    #[serde(default)]
    purpose: String,
    #[serde(default)]
    identity: String,
    #[serde(default)]
    callerid: String,
    public_key: String,
    /// Seconds since the Unix epoch.
    exp: i64,
    #[serde(default)]
    nbf: i64,
}

#[derive(Debug, Deserialize)]
struct TokenHeader {
    alg: String,
}

impl TrustedSigners {
    /// Public keys, each 64 hexadecimal digits; `Err` is the one that is none.
    pub fn new<'a>(keys: impl IntoIterator<Item = &'a str>) -> Result<Self, &'a str> {
        let keys = keys.into_iter().map(|key| public_key(key).ok_or(key)).collect::<Result<_, _>>()?;
        Ok(Self { keys })
    }

    /// The identity whose key has signed some content, both in base64; `None` if the signature or the token is not good. `now` is in
    /// seconds since the Unix epoch.
    pub(super) fn identity(&self, content: &str, signature: &str, token: &str, now: i64) -> Option<String> {
        let claims = self.claims(token, now)?;
        let key = KeyPair::from_public_key(&public_key(&claims.public_key)?).ok()?;
        key.verify(&STANDARD.decode(content).ok()?, &STANDARD.decode(signature).ok()?).ok()?;
        let identity = match claims.purpose.as_str() {
            "choria_server" => claims.identity,
            "choria_client_id" => claims.callerid,
            _ => return None,
        };
        Some(identity).filter(|identity| !identity.is_empty())
    }

    /// The claims of a token that a trusted key has signed and that is valid now.
    fn claims(&self, token: &str, now: i64) -> Option<SenderClaims> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let header: TokenHeader = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).ok()?).ok()?;
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        let trusted = self.keys.iter().any(|key| {
            KeyPair::from_public_key(key).is_ok_and(|key| key.verify(signed.as_bytes(), &signature).is_ok())
        });
        let claims: SenderClaims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
        (header.alg == "EdDSA" && trusted && claims.nbf <= now && now < claims.exp).then_some(claims)
    }
}

/// A public key of 64 hexadecimal digits as NATS writes one: base32 of a prefix, the key and a checksum.
fn public_key(hex: &str) -> Option<String> {
    const USER: u8 = 20 << 3;
    const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut raw = vec![USER];
    for at in (0..64).step_by(2) {
        raw.push(u8::from_str_radix(&hex[at..at + 2], 16).ok()?);
    }
    // CRC-16/XMODEM.
    let checksum = raw.iter().fold(0_u16, |crc, byte| {
        (0..8).fold(
            crc ^ (u16::from(*byte) << 8),
            |crc, _| {
                if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
            },
        )
    });
    raw.extend(checksum.to_le_bytes());
    let mut text = String::new();
    for chunk in raw.chunks(5) {
        let bits = chunk.iter().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
        text.extend((0..8).map(|at| char::from(LETTERS[(bits >> (35 - 5 * at)) as usize & 31])));
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_written_as_nats_does() {
        let pair = KeyPair::new_user();
        let expect = pair.public_key();
        let (_, bytes) = nkeys::from_public_key(&expect).unwrap();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(public_key(&hex), Some(expect));
        assert_eq!(public_key(&hex[1..]), None);
        assert_eq!(public_key(&"x".repeat(64)), None);
    }
}
