"""Training between and after the cuts.

loop.py         the loop of one stage; schedules.py: the learning rate over all stages
objectives.py   what it minimises
adapters.py     LoRA; kernels.py: the same training in less time or memory; spread.py: a model spread over processes (FSDP)
"""
