// Follows a stream with the polyfill of EventSource and prints its events, until `end` or until it gives up.
"use strict";

const { EventSourcePolyfill } = require("event-source-polyfill");

const source = new EventSourcePolyfill(process.argv[2]);
const print = (...event) => console.log(JSON.stringify(event));

for (const name of ["progress", "problem"]) {
  source.addEventListener(name, ({ data }) => print(name, JSON.parse(data)));
}
source.addEventListener("end", () => {
  print("end");
  process.exit();
});
source.addEventListener("error", ({ status }) => {
  if (source.readyState !== EventSourcePolyfill.CLOSED) return; // it reconnects
  print("gave up", status);
  process.exit();
});
