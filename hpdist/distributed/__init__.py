"""Everything that communicates: the engine, global statistics, the sharded teacher, checkpoints."""
