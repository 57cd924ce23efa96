"""How far groups of weights, neurons and heads moved in training, beside random partners like them."""
