"""podman and docker: their command lines, which one works here, and containers."""
