"""What all other folders use. Nothing here knows a pruning method or a model family.

model/    the nouns of a model (axes, masks, budgets, losses), and what is done with them: gate, cut, run layer by layer
events/   what happens in a run: events, how far it is, and the words for both
system/   files, processes, memory and terminals: what the package asks of the machine
"""
