"""The training engine: configuration, objective, data, DeepSpeed, sharded EMA, checkpoints, samplers, metrics, loop."""
