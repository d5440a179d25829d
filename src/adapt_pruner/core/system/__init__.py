"""Files, processes, memory and terminals: what the package asks of the machine.

files.py        files that are written whole or not at all, whose they are, whether they can be written; locks.py: locks
processes.py    child processes, and interrupts that wait; world.py: the processes that share a run, and how they watch each other
chat_template.py  other people's templates, in a process of little time and memory; memory.py: how much is held
terminal.py     the terminal, and text of others on it; strict_json.py, strict_yaml.py: plain figures, and keys that are read strictly
provenance.py   what made a result; parts.py: `@part` makes a function or class nameable in recipes
"""
