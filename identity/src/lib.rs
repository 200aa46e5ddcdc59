/// Generated client and server of Istio's certificate service.
pub mod ca_proto {
    tonic::include_proto!("istio.v1.auth");
}
