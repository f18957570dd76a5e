// The engine as it is now: the graph store, the paths of steps, the load. Text goes in through textContent alone.

const GROUPS = [
  ["decode/greedy", "Decoding, greedy: streams"],
  ["decode/full", "Decoding, sampled: streams"],
  ["decode/outside", "Decoding: streams"],
  ["prefill/full", "Prompts: tokens"],
  ["prefill/outside", "Prompts: tokens"],
];
const PATHS = ["exact", "padded", "eager", "loop"];
const COUNTERS = [
  ["captures", "Captures"],
  ["recaptures", "Recaptures"],
  ["evictions", "Evictions"],
  ["captures_abandoned", "Captures broken off"],
  ["compiles_after_ready", "Compiles after ready"],
];

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function count(value) {
  return typeof value === "number" ? value.toLocaleString("en") : "–";
}

function size(bytes) {
  if (typeof bytes !== "number") return "–";
  return bytes < 2 ** 20 ? `${(bytes / 2 ** 10).toFixed(0)} KiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

function fill(list, rows) {
  list.replaceChildren(...rows.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
}

function groupsOf(graphs) {
  const groups = new Map(GROUPS.map(([key]) => [key, []]));
  for (const [key, state] of Object.entries(graphs)) {
    const [phase, tokens, sampling] = key.split("/");
    groups.get(`${phase}/${sampling}`)?.push([Number(tokens), state]);
  }
  return groups;
}

function showGraphs(place, graphs) {
  const groups = groupsOf(graphs);
  const shown = [];
  for (const [key, title] of GROUPS) {
    const members = groups.get(key).sort((a, b) => a[0] - b[0]);
    if (!members.length) continue;
    const list = make("ul", "chips");
    list.setAttribute("aria-label", title);
    for (const [tokens, state] of members) {
      const chip = make("li", `chip ${state}`, String(tokens));
      chip.title = state;
      chip.append(make("span", "unseen", ` ${state}`));
      list.append(chip);
    }
    shown.push(make("p", "group", title), list);
  }
  place.replaceChildren(...shown);
}

function showPaths(place, paths) {
  const total = PATHS.reduce((sum, path) => sum + (paths[path] ?? 0), 0);
  const rows = PATHS.map((path) => {
    const share = total ? (paths[path] ?? 0) / total : 0;
    const row = make("div", "path");
    const bar = make("div", "bar");
    const part = make("span");
    part.style.width = `${(100 * share).toFixed(1)}%`;
    bar.append(part);
    bar.setAttribute("aria-hidden", "true");
    row.append(make("span", "", path), bar, make("span", "number", `${count(paths[path] ?? 0)}`));
    row.title = `${(100 * share).toFixed(1)} % of all steps`;
    return row;
  });
  place.replaceChildren(...rows);
}

export class Panel {
  constructor(find) {
    this.find = find;
    this.drawn = "";
  }

  show(page) {
    const { stats, beat, facts } = page;
    if (stats) {
      const graphs = stats.graphs ?? {};
      const states = Object.values(graphs);
      const of = (state) => states.filter((one) => one === state).length;
      const drawn = JSON.stringify(graphs);
      if (drawn !== this.drawn) showGraphs(this.find("groups"), graphs);
      this.drawn = drawn;
      const emulated = facts?.emulated ? "; emulated on the CPU" : "";
      this.find("store-note").textContent =
        `${of("ready")} ready, ${of("queued")} queued, ${of("capturing")} capturing, ${of("retiring")} retiring; ` +
        `${size(stats.graph_bytes)}${emulated}`;
      fill(this.find("counters"), COUNTERS.map(([key, name]) => [name, count(stats[key])]));
      showPaths(this.find("paths"), stats.paths ?? {});
    }
    const rows = [];
    if (facts) rows.push(["Device", `${facts.device}, ${facts.dtype}`]);
    if (beat) {
      rows.push(["Running, waiting", `${count(beat.running)}, ${count(beat.waiting)}`]);
      rows.push(["Free KV pages", `${count(beat.free_pages)} of ${count(beat.total_pages)}`]);
      rows.push(["Steps", count(beat.steps)]);
    }
    fill(this.find("load"), rows);
  }
}
