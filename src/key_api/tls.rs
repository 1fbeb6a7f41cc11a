//! Whom the client trusts and as whom it shows itself: the bundled roots, the
//! authorities and the certificate of the config, all with the one crypto
//! provider that the database driver uses too.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use crate::config::file::KeyApi;

const CA_FILE: &str = "key_api.ca_file";
const CERT_FILE: &str = "key_api.client_cert_file";
const KEY_FILE: &str = "key_api.client_key_file";

/// A key of the config whose file can't be used.
#[derive(Debug)]
pub struct Unusable {
    /// The dotted key.
    pub key: &'static str,
    /// Why; never anything out of a private key.
    pub reason: String,
}

/// Reads the files that the config names.
///
/// # Errors
/// The key whose file is missing, empty, not PEM or does not fit the others.
pub fn client_config(api: &KeyApi) -> Result<ClientConfig, Unusable> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable("key_api", format!("TLS can't be set up: {error}")))?
        .with_root_certificates(roots(api.ca_file.as_deref())?);
    match (&api.client_cert_file, &api.client_key_file) {
        (Some(certificate), Some(key)) => builder
            .with_client_auth_cert(certificates(CERT_FILE, certificate)?, private_key(key)?)
            .map_err(|error| mismatch(&error)),
        _ => Ok(builder.with_no_client_auth()),
    }
}

fn unusable(key: &'static str, reason: impl Into<String>) -> Unusable {
    Unusable { key, reason: reason.into() }
}

fn roots(ca_file: Option<&Path>) -> Result<RootCertStore, Unusable> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let Some(path) = ca_file else { return Ok(roots) };
    for (number, certificate) in (1..).zip(certificates(CA_FILE, path)?) {
        roots.add(certificate).map_err(|error| {
            let reason = format!("certificate {number} of `{}` can't be trusted: {error}", path.display());
            unusable(CA_FILE, reason)
        })?;
    }
    Ok(roots)
}

/// All certificates of a PEM file, of which there must be one.
fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let text = read(key, path)?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|error| unusable(key, format!("`{}` is no valid PEM file: {error}", path.display())))?;
    if certificates.is_empty() {
        return Err(unusable(key, format!("`{}` holds no certificate in PEM form", path.display())));
    }
    Ok(certificates)
}

/// The error of the parser may quote the file, so it is not passed on.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Unusable> {
    PrivateKeyDer::from_pem_slice(&read(KEY_FILE, path)?).map_err(|_| {
        let reason =
            format!("`{}` holds no private key in PEM form, or one that a password protects", path.display());
        unusable(KEY_FILE, reason)
    })
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, Unusable> {
    std::fs::read(path).map_err(|error| unusable(key, format!("`{}` can't be read: {error}", path.display())))
}

fn mismatch(error: &rustls::Error) -> Unusable {
    match error {
        rustls::Error::InvalidCertificate(_) => {
            unusable(CERT_FILE, format!("its certificate can't be used: {error}"))
        }
        _ => unusable(KEY_FILE, format!("its private key does not go with client_cert_file: {error}")),
    }
}
