"""Files of networks read as operators, for prediction: ONNX, and others that are stated as ONNX."""
