"""GGUF files as models: description, tensors and tokenizer in one file, or in the numbered parts of one.

The format is ggml's: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
