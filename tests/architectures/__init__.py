"""Every architecture of transformers that can be had small, and whether a trace sees and changes in it what plain hooks do.

python -m tests.architectures --out architectures.md
"""
