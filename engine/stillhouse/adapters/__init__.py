"""The same step in other people's trainers: Hugging Face's and its subclasses, Accelerate, Lightning.

Each module imports its library when it is imported itself, and raises MissingExtra without it.
"""
