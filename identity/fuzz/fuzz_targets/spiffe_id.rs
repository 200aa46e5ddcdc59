//! Names: whatever parses prints back as the same bytes, and its parts make the
//! same identity again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_identity::{IdentityTemplate, SpiffeId, TrustDomain, WorkloadIdentity};

fuzz_target!(|text: &str| {
    if let Ok(domain) = TrustDomain::parse(text) {
        assert_eq!(domain.as_str(), text);
        assert!(domain.as_str().len() <= 255);
    }
    let template = IdentityTemplate::parse(text);
    let Ok(id) = SpiffeId::parse(text) else {
        assert!(WorkloadIdentity::parse(text).is_err());
        return;
    };
    assert_eq!(id.to_string(), text);
    assert!(text.len() <= 2048 && text.is_ascii());
    assert_eq!(format!("spiffe://{}", id.principal()), text);
    assert!(id.path().starts_with('/') && !id.path().contains("//"));
    if let Ok(identity) = WorkloadIdentity::try_from(id) {
        let again = WorkloadIdentity::new(
            identity.trust_domain().clone(),
            identity.namespace(),
            identity.service_account(),
        );
        assert_eq!(again.as_ref(), Ok(&identity));
        for part in [identity.namespace(), identity.service_account()] {
            assert!(!part.is_empty() && part != "." && part != ".." && !part.contains(['/', ':']));
        }
        if let Ok(template) = template {
            template.fill_in(&identity);
        }
    }
});
