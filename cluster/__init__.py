"""Files that start a Ray cluster: on rented machines, on Kubernetes, and several nodes on this machine."""
