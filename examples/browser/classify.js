// Classifies an image with an exported network, by onnxruntime-web, on this computer's processor.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { prepare } from "./pixels.js";

/** Load a file, with the model card beside it, which has its classes and its preprocessing. */
export async function load(address) {
  const [session, card] = await Promise.all([
    fetched(address).then(async (file) => ort.InferenceSession.create(await file.arrayBuffer())),
    fetched(new URL("model-card.json", address)).then((file) => file.json()),
  ]);
  const [, channels, px] = session.inputMetadata[0].shape; // (batch, C, H, W)
  return { session, channels, px, ...card.task };
}

async function fetched(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address}: ${answer.status} ${answer.statusText}`);
  return answer;
}

/** Return each class with its probability, the most probable first. */
export async function classify(network, file) {
  const { session, channels, px, classes, mean, std, significant_bits: bits, pads } = network;
  const pixels = await prepare(file, px, channels, bits ?? 16, pads); // (px, px, C)
  const images = new Float32Array(pixels.length); // (1, C, px, px)
  for (let i = 0; i < pixels.length; i++) {
    const channel = i % channels;
    const value = (pixels[i] / 255 - mean[channel]) / std[channel];
    images[channel * px * px + Math.floor(i / channels)] = value;
  }
  const input = new ort.Tensor("float32", images, [1, channels, px, px]);
  const { [session.outputNames[0]]: output } = await session.run({ [session.inputNames[0]]: input });
  const logits = await output.getData();
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const shares = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = shares.reduce((a, b) => a + b);
  return classes.map((name, i) => ({ name, share: shares[i] / sum })).sort((a, b) => b.share - a.share);
}
