fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(
        [
            "proto/ca.proto",
            "proto/delegated_identity.proto",
            "proto/workload.proto",
        ],
        ["proto"],
    )?;
    tonic_prost_build::configure()
        // These hold private keys: `Debug` is written by hand.
        .skip_debug([
            ".spire.api.agent.delegatedidentity.v1.X509SvidWithKey",
            ".X509Svid",
        ])
        .compile_fds(files)?;
    Ok(())
}
