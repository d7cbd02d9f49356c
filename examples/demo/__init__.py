"""Trains a small Llama under three backends and shows the memory: python -m examples.demo"""
