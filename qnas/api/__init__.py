"""The Python API: what `import qnas` offers."""
