"""Ways from a model as it is to a stage's budget, and what they are made of: how much goes, which units, what makes up for them."""
