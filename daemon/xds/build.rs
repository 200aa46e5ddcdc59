fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(
        [
            "proto/discovery.proto",
            "proto/workload.proto",
            "proto/authorization.proto",
        ],
        ["proto"],
    )?;
    // Ordered maps: the same resource has the same bytes in every process, so
    // that a version can be made of its content.
    tonic_prost_build::configure()
        .btree_map(".")
        .compile_fds(files)?;
    Ok(())
}
