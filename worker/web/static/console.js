// The console's own script. Every page works without it.
"use strict";

// "/" focuses the search box, unless the person is typing.
document.addEventListener("keydown", (event) => {
  const box = document.querySelector("#search");
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (event.key === "/" && box && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    box.focus();
  }
});
