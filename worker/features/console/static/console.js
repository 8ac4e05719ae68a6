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

// A button that copies a text shows where the browser can do so, which it may over HTTPS and on this machine.
if (navigator.clipboard) document.documentElement.classList.add("can-copy");
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const copied = await navigator.clipboard.writeText(button.dataset.copy).then(() => true, () => false);
  button.textContent = copied ? "Copied" : "Select it and copy";
});

// The page of an unfinished run follows its stream of events, or asks for the page again every few seconds.
const POLL = 5000, MAX_LINES = 2000;
let following = null;

function after(line, place) {
  const [attempt, seq] = place.split(".").map(Number);
  return line.attempt > attempt || (line.attempt === attempt && line.seq > seq);
}

function addLine(list, line) {
  if (!after(line, list.dataset.newest)) return;
  const item = document.createElement("li"), time = document.createElement("time");
  const level = document.createElement("b"), text = document.createElement("span");
  item.className = ["debug", "info", "warning", "error", "critical"].includes(line.level) ? line.level : "info";
  time.dateTime = line.at;
  time.textContent = line.at.slice(11, 19);
  level.textContent = line.source === "log" ? line.level : line.source;
  text.textContent = line.text.length > 2000 ? `${line.text.slice(0, 2000)} …` : line.text;
  item.append(time, " ", level, " ", text);
  list.append(item);
  list.dataset.newest = `${line.attempt}.${line.seq}`;
  while (list.children.length > MAX_LINES) list.firstElementChild.remove();
  list.parentElement.classList.remove("nothing");
  document.querySelector("#log-empty")?.remove();
}

function showProgress(progress) {
  const place = document.querySelector("#progress");
  // The first report needs the card that the server draws.
  if (!progress || !place) return progress ? redraw() : undefined;
  const bar = place.querySelector("progress"), total = progress.total ? ` of ${progress.total}` : "";
  if (bar && progress.total) [bar.max, bar.value] = [progress.total, progress.done];
  place.querySelector("p").textContent = `${progress.done}${total} done${progress.note ? ` · ${progress.note}` : ""}`;
}

// Replace the page's content by what the server shows now, unless somebody is about to change something.
async function redraw() {
  if (document.querySelector("details.confirm[open]")) return;
  const answer = await fetch(location.pathname, { headers: { accept: "text/html" } }).catch(() => null);
  if (!answer?.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.querySelector("#main"), focused = document.activeElement?.id;
  if (!fresh || document.querySelector("details.confirm[open]")) return;
  document.title = page.title;
  document.querySelector("#main").replaceChildren(...fresh.childNodes);
  if (focused) document.getElementById(focused)?.focus();
  follow();
}

function follow() {
  const live = document.querySelector("[data-live]");
  following?.stop();
  following = null;
  if (!live) return;
  const list = document.querySelector("#log-lines"), status = document.querySelector("#live-state");
  let timer = 0;
  const poll = () => { timer ||= setInterval(redraw, POLL); };
  const source = new EventSource(`${live.dataset.live}?after=${list.dataset.newest}`);
  following = { stop() { source.close(); clearInterval(timer); } };
  source.addEventListener("open", () => { status.textContent = "Live: new lines appear as they are written."; });
  source.addEventListener("log", (event) => [JSON.parse(event.data)].flat().forEach((line) => addLine(list, line)));
  source.addEventListener("progress", (event) => showProgress(JSON.parse(event.data).progress));
  source.addEventListener("state", (event) => {
    if (JSON.parse(event.data).state !== live.dataset.state) redraw();
  });
  source.addEventListener("error", () => {
    // It connects again by itself, unless the server refused.
    if (source.readyState === EventSource.CLOSED) poll();
  });
}
follow();

// A list says how much is new since it was made. Its stream is open only while the page is in sight.
const SPEAK = 10000, MIN_RETRY = 5000, MAX_RETRY = 60000;

function ago(seconds) {
  if (seconds < 60) return `${seconds} s ago`;
  return seconds < 3600 ? `${Math.floor(seconds / 60)} min ago` : `${Math.floor(seconds / 3600)} h ago`;
}

function howMany(data) {
  if (!data.new) return data.more ? "There may be new ones" : "";
  return `${data.new}${data.more ? " or more" : ""} new`;
}

// What became of a stream that the server refused, or of a server that does not answer (status 0).
function refusal(status) {
  if (status === 401) return "no longer live: you are logged out";
  if (status === 429) return "not live: too many pages are open; asking again";
  if (status === 204 || (status >= 400 && status < 500)) return "no longer live";
  return "no longer live; asking again";
}

function watch(bar) {
  const link = bar.querySelector("a"), age = bar.querySelector("span"), status = bar.querySelector("[role=status]");
  let source = null, timer = 0, retry = MIN_RETRY, trouble = "", spokenAt = -SPEAK, speaking = 0;
  const say = () => {
    clearTimeout(speaking);
    speaking = setTimeout(() => {
      const text = [link.classList.contains("some") ? link.textContent : "", trouble].filter(Boolean).join(", ");
      if (text === status.textContent) return;
      status.textContent = text;
      spokenAt = performance.now();
    }, Math.max(0, spokenAt + SPEAK - performance.now()));
  };
  const show = () => {
    age.textContent = `updated ${ago(Math.floor((Date.now() - performance.timeOrigin) / 1000))}${trouble && ` · ${trouble}`}`;
  };
  const inTrouble = (text) => {
    if (text === trouble) return;
    trouble = text;
    show();
    say();
  };
  const close = () => {
    source?.close();
    source = null;
    clearTimeout(timer);
  };
  const open = () => {
    close();
    const mine = source = new EventSource(bar.dataset.stream);
    source.addEventListener("open", () => {
      retry = MIN_RETRY;
      inTrouble("");
    });
    source.addEventListener("news", (event) => {
      const text = howMany(JSON.parse(event.data));
      link.textContent = text || "Refresh";
      link.classList.toggle("some", Boolean(text));
      say();
    });
    source.addEventListener("error", async () => {
      // It connects again by itself, unless the server refused.
      if (mine.readyState !== EventSource.CLOSED) return inTrouble(refusal(0));
      const answer = await fetch(bar.dataset.stream, { method: "HEAD" }).catch(() => null);
      if (mine !== source) return;
      const code = answer?.status ?? 0;
      inTrouble(refusal(code === 200 ? 0 : code));
      if (!trouble.endsWith("asking again")) return;
      timer = setTimeout(open, Math.max(retry, 1000 * (answer?.headers.get("retry-after") || 0)));
      retry = Math.min(2 * retry, MAX_RETRY);
    });
  };
  const look = () => {
    show();
    if (document.hidden) close();
    else if (!source) open();
  };
  document.addEventListener("visibilitychange", look);
  setInterval(() => { if (!document.hidden) show(); }, 1000);
  look();
}
document.querySelectorAll("[data-stream]").forEach(watch);

// A change of many runs goes on in parts while its page is open, so that the progress shows. Without a
// script one form changes up to 1,000 runs.
const PART = 25;
document.addEventListener("submit", async (event) => {
  let form = event.target;
  if (!form.matches("form[data-parts]") || event.submitter?.value === "first") return;
  event.preventDefault();
  const main = document.querySelector("#main");
  while (form) {
    const body = new URLSearchParams(new FormData(form));
    body.set("most", PART);
    form.querySelectorAll("button").forEach((button) => { button.disabled = true; });
    const answer = await fetch(form.action, { method: "POST", body }).catch(() => null);
    if (!answer) {
      form.querySelectorAll("button").forEach((button) => { button.disabled = false; });
      return;
    }
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const left = [...main.querySelectorAll(".notice.left")];
    main.replaceChildren(...page.querySelector("#main").childNodes);
    main.prepend(...left);
    if (answer.redirected) history.replaceState(null, "", answer.url);
    window.htmx?.process(main);
    form = answer.ok ? main.querySelector("form[data-parts]") : null;
    if (form && !form.elements.after.value) form = null;
  }
});
