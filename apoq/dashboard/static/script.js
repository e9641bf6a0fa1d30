// Refreshes the page, and shows times in the viewer's zone. Every page works without it.
"use strict";
(() => {
  const every = Number(document.body.dataset.every) * 1000;
  const status = document.getElementById("updates");
  const FOCUSABLE = "a, button, summary, input, select, pre[tabindex]";
  let isPaused = false;
  let timer = 0;
  let failures = 0;

  const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

  function showTimes(root) {
    for (const each of root.querySelectorAll("time[datetime]")) {
      const at = new Date(each.dateTime);
      if (Number.isNaN(at.getTime())) continue;
      const utc = each.title;
      if (each.hasAttribute("data-clock")) {
        each.textContent = clock.format(at);
        each.title = utc;
      } else {
        each.title = `${clock.format(at)} (${utc})`;
      }
    }
  }

  // A person is filling in a form, has opened one, or is selecting text.
  function isBusy(live) {
    const focused = document.activeElement;
    const writes = live.contains(focused) && focused.matches("input, select, textarea");
    const selection = document.getSelection();
    const selects = selection && !selection.isCollapsed && live.contains(selection.anchorNode);
    return writes || selects || live.querySelector("details.ask[open]") !== null;
  }

  // A person may have opened or closed them.
  function keepOpen(live, fresh) {
    const shown = [...live.querySelectorAll("details:not(.ask)")];
    for (const each of fresh.querySelectorAll("details:not(.ask)")) {
      const title = each.querySelector("summary").textContent;
      const same = shown.find((other) => other.querySelector("summary").textContent === title);
      if (same) each.open = same.open;
    }
  }

  function replace(live, fresh) {
    keepOpen(live, fresh);
    if (live.innerHTML === fresh.innerHTML) return;
    const index = [...live.querySelectorAll(FOCUSABLE)].indexOf(document.activeElement);
    live.replaceChildren(...fresh.childNodes);
    showTimes(live);
    const next = index < 0 ? null : live.querySelectorAll(FOCUSABLE)[index];
    if (next) next.focus({ preventScroll: true });
  }

  async function refresh() {
    const live = document.getElementById("live");
    if (!live || isPaused || document.hidden) return;
    if (!isBusy(live)) {
      try {
        const headers = { "X-Apoq-Refresh": "1" };
        const response = await fetch(location.href, { headers, credentials: "same-origin" });
        if (!response.ok) throw new Error(String(response.status));
        const page = new DOMParser().parseFromString(await response.text(), "text/html");
        const fresh = page.getElementById("live");
        if (fresh && !isBusy(live) && !isPaused) {
          document.title = page.title;
          showTimes(fresh);
          replace(live, fresh);
        }
        failures = 0;
        say("");
      } catch {
        failures += 1;
        say("not updated: the server doesn’t respond");
      }
    }
    plan();
  }

  // Slower if it fails, and not at all in a hidden tab.
  function plan() {
    clearTimeout(timer);
    if (!isPaused && !document.hidden) timer = setTimeout(refresh, every * Math.min(12, 2 ** failures));
  }

  const note = document.createElement("span");
  function say(text) {
    if (note.textContent !== text) note.textContent = text;
  }

  showTimes(document);
  if (every > 0) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet";
    button.textContent = "Pause updates";
    button.addEventListener("click", () => {
      isPaused = !isPaused;
      button.textContent = isPaused ? "Resume updates" : "Pause updates";
      if (isPaused) clearTimeout(timer);
      else refresh();
    });
    note.setAttribute("role", "status");
    status.append(note, button);
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) clearTimeout(timer);
      else refresh();
    });
    plan();
  }
})();
