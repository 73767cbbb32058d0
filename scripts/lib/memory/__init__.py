"""Long-term memory: a queue in Valkey, Graphiti's graphs in FalkorDB, and workers between them."""
