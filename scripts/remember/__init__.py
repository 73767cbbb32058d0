"""What ``scripts/memory`` is made of: a queue in Valkey, Graphiti's graph in FalkorDB, and the workers between them."""
