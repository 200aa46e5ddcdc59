/// Generated protobuf types.
pub mod proto {
    pub mod discovery {
        tonic::include_proto!("envoy.service.discovery.v3");
    }
    pub mod workload {
        tonic::include_proto!("istio.workload");
    }
    pub mod security {
        tonic::include_proto!("istio.security");
    }
}
