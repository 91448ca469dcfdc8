"""DeepSpeed ZeRO: process group, configuration, optimizer step, sharded EMA, the teacher's
weights.
"""
