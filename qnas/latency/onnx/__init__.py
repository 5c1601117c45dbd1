"""ONNX files read as operators, for prediction."""
