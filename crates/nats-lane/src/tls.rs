//! TLS settings to a rustls configuration, the same for lanes and for async-nats.

use std::{fmt, net::IpAddr, path::Path, sync::Arc};

use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject};
use tracing::warn;

use crate::{Error, Tls};

/// Builds the client configuration for one connection; files are read now.
pub(crate) fn client_config(tls: &Tls) -> Result<ClientConfig, Error> {
    let provider = Arc::new(ring::default_provider());
    let verifier = verifier(tls, &provider)?;
    let builder = builder(provider.clone()).dangerous().with_custom_certificate_verifier(verifier);
    match certified_key(tls, &provider)? {
        Some(key) => Ok(builder.with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)))),
        None => Ok(builder.with_no_client_auth()),
    }
}

/// A configuration for all connections of a client, whose files are read again at every handshake. A server that is
/// connected to by an address has the certificate of one of the `names` of that address, if it has any.
pub(crate) fn rereading_config(
    settings: impl Fn() -> Result<Tls, Error> + Send + Sync + 'static,
    names: impl Fn(IpAddr) -> Vec<ServerName<'static>> + Send + Sync + 'static,
) -> ClientConfig {
    let provider = Arc::new(ring::default_provider());
    let rereading =
        Arc::new(Rereading { settings: Box::new(settings), names: Box::new(names), provider: provider.clone() });
    let builder = builder(provider).dangerous().with_custom_certificate_verifier(rereading.clone());
    let mut config = builder.with_client_cert_resolver(rereading);
    // A session that is taken up again keeps the certificates of the one before.
    config.resumption = Resumption::disabled();
    config
}

fn builder(provider: Arc<CryptoProvider>) -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    builder.expect("the provider knows the default versions of TLS")
}

fn verifier(tls: &Tls, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>, Error> {
    if tls.insecure {
        return Ok(Arc::new(AcceptAny(provider.clone())));
    }
    let roots = Arc::new(roots(tls.ca.as_deref())?);
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build();
    Ok(verifier.map_err(|error| Error::hold(format!("no certificate authority can be trusted: {error}")))?)
}

fn certified_key(tls: &Tls, provider: &CryptoProvider) -> Result<Option<CertifiedKey>, Error> {
    let (Some(cert), Some(key)) = (&tls.cert, &tls.key) else { return Ok(None) };
    let chain = certificates(cert)?;
    let key = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| Error::hold(format!("cannot read the key in `{}`: {error}", key.display())))?;
    let certified = CertifiedKey::from_der(chain, key, provider);
    certified.map(Some).map_err(|error| Error::hold(format!("certificate `{}`: {error}", cert.display())))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let unreadable = |error| Error::hold(format!("cannot read certificates in `{}`: {error}", path.display()));
    let found = CertificateDer::pem_file_iter(path).map_err(unreadable)?;
    let found: Vec<_> = found.collect::<Result<_, _>>().map_err(unreadable)?;
    if found.is_empty() {
        return Err(Error::hold(format!("`{}` holds no PEM certificate", path.display())));
    }
    Ok(found)
}

fn roots(ca: Option<&Path>) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(path) => {
            for certificate in certificates(path)? {
                roots
                    .add(certificate)
                    .map_err(|error| Error::hold(format!("certificate authority `{}`: {error}", path.display())))?;
            }
        }
        // Single certificates of a system's store may be unusable; the others still serve.
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    Ok(roots)
}

/// Verifies and shows certificates by what the files say at the time.
struct Rereading {
    settings: Box<dyn Fn() -> Result<Tls, Error> + Send + Sync>,
    names: Box<dyn Fn(IpAddr) -> Vec<ServerName<'static>> + Send + Sync>,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Rereading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rereading")
    }
}

impl ResolvesClientCert for Rereading {
    fn resolve(&self, _root_hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let key = (self.settings)().and_then(|tls| certified_key(&tls, &self.provider));
        key.unwrap_or_else(|error| {
            warn!("no client certificate is shown: {error}");
            None
        })
        .map(Arc::new)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ServerCertVerifier for Rereading {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verifier = (self.settings)().and_then(|tls| verifier(&tls, &self.provider));
        let verifier = verifier.map_err(|error| rustls::Error::General(error.message))?;
        let verify =
            |name: &ServerName<'_>| verifier.verify_server_cert(end_entity, intermediates, name, ocsp_response, now);
        let names = match server_name {
            ServerName::IpAddress(address) => (self.names)((*address).into()),
            _ => Vec::new(),
        };
        let verified = names.iter().map(verify).reduce(Result::or);
        verified.unwrap_or_else(|| verify(server_name))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// `insecure`: any certificate will do, but the handshake's signatures are still checked.
#[derive(Debug)]
struct AcceptAny(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
