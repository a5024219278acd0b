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

/// The TLS settings of the time.
type TlsSource = dyn Fn() -> Result<Tls, Error> + Send + Sync;

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
    let (provider, settings): (_, Arc<TlsSource>) = (Arc::new(ring::default_provider()), Arc::new(settings));
    let rereading = Rereading { settings: settings.clone(), provider: provider.clone() };
    let builder = builder(provider.clone()).dangerous();
    let builder = builder.with_custom_certificate_verifier(verifier_of_now(settings, names, provider));
    let mut config = builder.with_client_cert_resolver(Arc::new(rereading));
    // A resumed session keeps the certificates of the one before.
    config.resumption = Resumption::disabled();
    config
}

fn builder(provider: Arc<CryptoProvider>) -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    builder.expect("the provider knows the default versions of TLS")
}

fn verifier(tls: &Tls, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>, Error> {
    if tls.insecure {
        // Any certificate will do.
        let check = |_: &Presented<'_>, _: &ServerName<'_>| Ok(ServerCertVerified::assertion());
        return Ok(Arc::new(CheckedBy { check, provider: provider.clone() }));
    }
    let roots = Arc::new(roots(tls.ca.as_deref())?);
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone()).build();
    Ok(verifier.map_err(|error| Error::hold(format!("no certificate authority can be trusted: {error}")))?)
}

/// Verifies certificates by the files of the time.
fn verifier_of_now(
    settings: Arc<TlsSource>,
    names: impl Fn(IpAddr) -> Vec<ServerName<'static>> + Send + Sync + 'static,
    provider: Arc<CryptoProvider>,
) -> Arc<dyn ServerCertVerifier> {
    let of_now = provider.clone();
    let check = move |presented: &Presented<'_>, server_name: &ServerName<'_>| {
        let verifier = settings().and_then(|tls| verifier(&tls, &of_now));
        let verifier = verifier.map_err(|error| rustls::Error::General(error.message))?;
        let names = match server_name {
            ServerName::IpAddress(address) => names((*address).into()),
            _ => Vec::new(),
        };
        let verified = names.iter().map(|name| presented.verify(&*verifier, name)).reduce(Result::or);
        verified.unwrap_or_else(|| presented.verify(&*verifier, server_name))
    };
    Arc::new(CheckedBy { check, provider })
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

/// Shows the certificate that the files have at the time.
struct Rereading {
    settings: Arc<TlsSource>,
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

/// A certificate and everything that a server sent with it.
struct Presented<'a> {
    certificate: &'a CertificateDer<'a>,
    intermediates: &'a [CertificateDer<'a>],
    ocsp: &'a [u8],
    now: UnixTime,
}

impl Presented<'_> {
    fn verify(
        &self,
        verifier: &dyn ServerCertVerifier,
        name: &ServerName<'_>,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verifier.verify_server_cert(self.certificate, self.intermediates, name, self.ocsp, self.now)
    }
}

/// Judges certificates by `check`; the signatures of the handshake are checked in any case.
struct CheckedBy<C> {
    check: C,
    provider: Arc<CryptoProvider>,
}

impl<C> fmt::Debug for CheckedBy<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CheckedBy")
    }
}

impl<C> ServerCertVerifier for CheckedBy<C>
where
    C: Fn(&Presented<'_>, &ServerName<'_>) -> Result<ServerCertVerified, rustls::Error> + Send + Sync,
{
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        (self.check)(&Presented { certificate, intermediates, ocsp, now }, server_name)
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
