"""Four experiments from interpretability papers, each a program that ends in a figure, and a session at the prompt.

python -m nnsight_eager.examples.logit_lens                 # what each layer would answer, at every token
python -m nnsight_eager.examples.activation_patching        # where the model keeps who is to be named
python -m nnsight_eager.examples.attribution_patching       # the same by gradients, beside the real patches
python -m nnsight_eager.examples.stepping                   # a forward pass held open and walked through
python -m nnsight_eager.examples.steering                   # a direction of sentiment, added while the model writes
"""
