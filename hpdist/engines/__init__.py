"""What computes and shards: one process, DDP or ZeRO, the loss scale, the sharded teacher."""
