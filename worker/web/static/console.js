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

// Tell the server the viewer's time zone, unless one was chosen; it shows from the next page on.
(() => {
  const name = location.protocol === "https:" ? "__Host-orgworker_zone" : "orgworker_zone";
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  const known = document.cookie.split("; ").some((each) => each.startsWith(`${name}=`));
  if (zone && !known && /^[A-Za-z0-9_+\/-]{1,60}$/.test(zone)) {
    const secure = location.protocol === "https:" ? "; secure" : "";
    document.cookie = `${name}=${zone}; path=/; max-age=31536000; samesite=lax${secure}`;
  }
})();
