// The page: an image that the user chooses, and its likeliest classes.

import { classify, load } from "./classify.js";

const SHOWN = 5; // classes
const [choose, picture, said, classes] = ["choose", "picture", "said", "classes"].map((id) =>
  document.getElementById(id),
);
const model = new URLSearchParams(location.search).get("model") ?? "model.onnx";
const loaded = load(new URL(model, location.href));

/** Show the classes of an image file. */
async function show(file) {
  classes.replaceChildren();
  said.textContent = "Classifying ...";
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(file);
  picture.hidden = false;
  const network = await loaded;
  const started = performance.now();
  const found = await classify(network, file);
  const took = performance.now() - started;
  for (const { name, share } of found.slice(0, SHOWN)) {
    const row = document.createElement("li");
    const bar = document.createElement("meter");
    bar.value = share;
    row.append(bar, ` ${(100 * share).toFixed(2)}% `, name); // a name is text, never markup
    classes.append(row);
  }
  said.textContent = `Read and classified in ${took.toFixed(0)} ms.`;
}

function fail(error) {
  said.textContent = `Failed: ${error.message}`;
}

choose.addEventListener("change", () => {
  if (choose.files.length > 0) show(choose.files[0]).catch(fail);
});
loaded.then(({ px, classes: names }) => {
  said.textContent = `A network of ${names.length} classes, for images of ${px} x ${px} pixels.`;
  choose.disabled = false;
}, fail);
