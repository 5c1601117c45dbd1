// The pixels of an image file as networks of qnas see them: the steps of ../classify.py, in a browser.
//
// A browser hides some of what Python reads: it keeps the upper 8 bits of 16, it does not turn a WebP by its
// EXIF, and it decodes a large JPEG whole, where Pillow does so at a fraction of its size.

/** Return the central square of an image file at px x px pixels, as bytes (px, px, channels). */
export async function prepare(file, px, channels, bits = 16, pads = false) {
  if (bits < 16 && (await isDeep(file))) {
    throw new Error(`a browser reads 8 of its 16 bits, of which ${bits} are significant`);
  }
  let { pixels, height, width } = await decode(file);
  if (channels === 1) pixels = grey(pixels);
  const side = Math.min(height, width);
  const [top, left] = [(height - side) / 2, (width - side) / 2].map(halfToEven);
  pixels = cut(pixels, width, channels, top, left, side);
  if (!pads || side >= px || px >= 1.5 * side) return resize(pixels, side, px, channels);
  return bordered(pixels, side, px, channels); // slightly smaller images get a black border
}

/** Tell whether a file is a PNG of 16 bits. */
async function isDeep(file) {
  const start = new Uint8Array(await file.slice(0, 25).arrayBuffer());
  return String.fromCharCode(...start.subarray(1, 4)) === "PNG" && start[24] === 16;
}

/** Decode an image file to bytes (H, W, 3), upright by its EXIF, and on white if it is transparent. */
async function decode(file) {
  // without conversion between colour spaces, as Pillow reads it
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(file, options);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height); // (H, W, 4)
  return { pixels: picked(data, 4, 3), height, width };
}

/** Return the first channels of pixels of so many: (..., from) -> (..., to). */
function picked(pixels, from, to) {
  const kept = new Uint8Array((pixels.length / from) * to);
  for (let i = 0, place = 0; i < pixels.length; i += from) {
    for (let channel = 0; channel < to; channel++) kept[place++] = pixels[i + channel];
  }
  return kept;
}

/** Return colours as grey, (H, W, 3) -> (H, W, 1), rounded as torchvision's multiply-adds are. */
function grey(pixels) {
  const shares = [0.2989, 0.587, 0.114].map(Math.fround);
  const found = new Uint8Array(pixels.length / 3);
  let isGrey = true;
  for (let i = 0; i < found.length; i++) {
    const [red, green, blue] = [pixels[3 * i], pixels[3 * i + 1], pixels[3 * i + 2]];
    isGrey &&= red === green && green === blue;
    let total = Math.fround(shares[0] * red);
    for (const [share, colour] of [[shares[1], green], [shares[2], blue]]) {
      total = Math.fround(share * colour + total);
    }
    found[i] = Math.trunc(total);
  }
  return isGrey ? picked(pixels, 3, 1) : found; // a grey file stays as it is
}

/** Return the square at (top, left) of an image (H, W, C): (side, side, C). */
function cut(pixels, width, channels, top, left, side) {
  const square = new Uint8Array(side * side * channels);
  for (let row = 0; row < side; row++) {
    const start = ((top + row) * width + left) * channels;
    square.set(pixels.subarray(start, start + side * channels), row * side * channels);
  }
  return square;
}

/** Return a square image (S, S, C) in the middle of a black one (px, px, C). */
function bordered(pixels, size, px, channels) {
  const whole = new Uint8Array(px * px * channels);
  const before = Math.floor((px - size) / 2);
  for (let row = 0; row < size; row++) {
    const line = pixels.subarray(row * size * channels, (row + 1) * size * channels);
    whole.set(line, ((before + row) * px + before) * channels);
  }
  return whole;
}

/**
 * Resize a square image (S, S, C) to (px, px, C): bilinear, antialiased, as torch does it with bytes.
 *
 * Weights are whole numbers of at most 15 bits, and columns are resized before rows.
 */
function resize(pixels, size, px, channels) {
  if (size === px) return pixels;
  const scale = size / px;
  const reach = Math.max(scale, 1);
  const windows = []; // of each new column: the first old one, and the weights from there
  for (let i = 0; i < px; i++) {
    const centre = scale * (i + 0.5);
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach + 0.5), size);
    const weights = [];
    for (let near = first; near < end; near++) {
      weights.push(Math.max(1 - Math.abs(near - centre + 0.5) / reach, 0));
    }
    const sum = weights.reduce((total, weight) => total + weight);
    windows.push([first, weights.map((weight) => weight / sum)]);
  }
  const largest = Math.max(...windows.map(([, weights]) => Math.max(...weights)));
  let bits = 14;
  while (bits < 22 && Math.trunc(largest * 2 ** (bits + 1) + 0.5) < 2 ** 15) bits++;
  const one = 2 ** bits;
  for (const [, weights] of windows) {
    weights.forEach((weight, i) => (weights[i] = Math.floor(weight * one + 0.5)));
  }
  const narrow = blend(pixels, size, size, channels, windows, one); // (px, size, C), columns first
  return blend(narrow, px, size, channels, windows, one);
}

/** Blend the columns of an image by windows, and exchange both: (rows, columns, C) -> (windows, rows, C). */
function blend(pixels, rows, columns, channels, windows, one) {
  const blended = new Uint8ClampedArray(windows.length * rows * channels);
  let place = 0;
  for (const [first, weights] of windows) {
    for (let row = 0; row < rows; row++) {
      const start = (row * columns + first) * channels;
      for (let channel = 0; channel < channels; channel++) {
        let sum = 0;
        for (let near = 0; near < weights.length; near++) {
          sum += weights[near] * pixels[start + near * channels + channel];
        }
        blended[place++] = Math.floor(sum / one + 0.5);
      }
    }
  }
  return blended;
}

/** Round as Python does: a half to the even neighbour. */
function halfToEven(value) {
  const rounded = Math.round(value);
  return rounded - value === 0.5 && rounded % 2 === 1 ? rounded - 1 : rounded;
}
