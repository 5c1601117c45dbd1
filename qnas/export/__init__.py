"""A trained network as files that run without qnas: ONNX, OpenVINO, torch.export, plain Python."""
