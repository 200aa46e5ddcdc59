#![allow(clippy::unwrap_used)]
use super::*;

const GOOD: &str = "\
node: {name: node-a, address: 10.77.0.1}
control_plane:
  address: https://10.77.0.1:15012
  root_ca: /tmp/root.pem
  token: /tmp/token
pods:
  - {netns: /run/netns/a, namespace: demo, name: client}
";

fn parse(text: &str) -> Result<AgentConfig, ConfigError> {
    AgentConfig::parse(Path::new("agent.yaml"), text)
}

#[test]
fn minimal_config_gets_the_documented_defaults() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.root_namespace, "ringfence-system");
    assert_eq!(config.record_layer, RecordLayerChoice::Auto);
    assert_eq!(config.policy_hold(), Duration::from_secs(5));
    assert_eq!(config.control_plane.ca(), "https://10.77.0.1:15012");
}

#[test]
fn the_documented_example_is_good() {
    let text = include_str!("../../../deploy/examples/agent.yaml");
    let config = parse(text).unwrap();
    assert_eq!(config.admin_socket, default_admin_socket());
}

#[test]
fn unknown_field_is_refused_with_file_and_line() {
    let text = GOOD.replace("  token: /tmp/token\n", "  token: /tmp/token\n  tokn: x\n");
    let error = parse(&text).unwrap_err().to_string();
    assert!(error.starts_with("agent.yaml:6:"), "{error}");
    assert!(error.contains("tokn"), "{error}");
}

#[test]
fn every_identity_source_can_be_configured() {
    let source = |yaml: &str| {
        parse(&format!("{GOOD}identity: {{source: {yaml}}}\n"))
            .unwrap()
            .identity
            .source
    };
    assert_eq!(source("ca"), Source::Ca);
    assert!(matches!(
        source("{files: {directory: /x}}"),
        Source::Files(_)
    ));
    assert!(matches!(source("{spire: {socket: /x}}"), Source::Spire(_)));
    assert!(matches!(
        source("{workload-api: {socket: /x}}"),
        Source::WorkloadApi(_)
    ));
}

#[test]
fn most_specific_outbound_mode_counts() {
    let text = format!(
        "{GOOD}egress:\n  mode: registry-only\n  overrides:\n\
         \x20 - {{namespace: demo, mode: allow-any}}\n\
         \x20 - {{namespace: demo, name: batch, mode: registry-only}}\n"
    );
    let egress = parse(&text).unwrap().egress;
    assert_eq!(egress.mode("demo", "batch"), OutboundMode::RegistryOnly);
    assert_eq!(egress.mode("demo", "web"), OutboundMode::AllowAny);
    assert_eq!(egress.mode("other", "batch"), OutboundMode::RegistryOnly);
    let default = parse(GOOD).unwrap().egress;
    assert_eq!(default.mode("demo", "web"), OutboundMode::AllowAny);
}

#[test]
fn outbound_mode_named_twice_is_refused() {
    let twice = "{namespace: demo, mode: allow-any}";
    let text = format!("{GOOD}egress: {{overrides: [{twice}, {twice}]}}\n");
    let error = parse(&text).unwrap_err().to_string();
    assert!(error.contains("egress.overrides[1]"), "{error}");
    assert!(parse(&format!("{GOOD}egress: {{mode: deny}}\n")).is_err());
}

#[test]
fn exported_keys_need_a_source_that_can_make_them() {
    let text =
        format!("{GOOD}identity: {{source: {{spire: {{socket: /x}}}}, workload_api_socket: /y}}\n");
    let error = parse(&text).unwrap_err().to_string();
    assert!(error.contains("identity.workload_api_socket"), "{error}");
}

#[test]
fn audit_log_is_off_by_default_and_bounded() {
    let config = parse(GOOD).unwrap();
    assert_eq!(config.audit, Audit::default());
    assert_eq!(config.audit.verdicts, AuditedVerdicts::Off);
    let audit = |yaml: &str| parse(&format!("{GOOD}audit: {{{yaml}}}\n"));
    let config = audit("verdicts: denied, path: /var/log/a.jsonl, files: 1").unwrap();
    assert_eq!(config.audit.max_megabytes, 64);
    for bad in [
        "verdicts: some",
        "files: 0",
        "max_megabytes: 0",
        "path: a.jsonl",
        "size: 1",
    ] {
        assert!(audit(bad).is_err(), "{bad}");
    }
}

#[test]
fn plaintext_control_plane_is_refused() {
    let error = parse(&GOOD.replace("https://", "http://"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("control_plane.address"), "{error}");
}

#[test]
fn namespace_listed_twice_is_refused() {
    let text = format!("{GOOD}  - {{netns: /run/netns/a, namespace: demo, name: other}}\n");
    let error = parse(&text).unwrap_err().to_string();
    assert!(error.contains("pods[1].netns"), "{error}");
}
