"""Engines compute and shard: one process, DDP or ZeRO, the loss scale, the sharded teacher."""
