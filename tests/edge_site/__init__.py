"The edge site in pods: the manifests of edge/k3s, started by podman."
