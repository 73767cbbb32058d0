"""What a build starts from: OpenAgents, the base image and extra CAs."""
