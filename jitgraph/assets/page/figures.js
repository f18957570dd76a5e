// The times of one answer as this page received its tokens, and how they are shown. Tokens that one read of the network
// brought share the gap before them; those that came with the first token have none.

const MOST_POINTS = 240;
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [240, 32];

export class Times {
  constructor() {
    this.begin = performance.now();
    this.ttft = null;
    this.last = null;
    this.gaps = [];
    this.tokens = null; // the server's own count, with the last event
  }

  received(at, count) {
    if (this.ttft === null) {
      this.ttft = at - this.begin;
    } else {
      for (let i = 0; i < count; i++) this.gaps.push((at - this.last) / count);
    }
    this.last = at;
  }

  quantile(share) {
    if (!this.gaps.length) return null;
    const sorted = [...this.gaps].sort((a, b) => a - b);
    return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  }
}

export function ms(value) {
  if (value === null) return "–";
  return `${value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : value.toFixed(0)} ms`;
}

export class Figures {
  // One line under an answer.
  constructor(place) {
    this.place = place;
    this.numbers = {};
    for (const [name, title] of [
      ["TTFT", "Time from sending the request to the first token"],
      ["ITL", "Median gap between tokens"],
      ["ITL P99", "All but one in a hundred gaps are at most this"],
      ["tokens", "Tokens of the answer"],
    ]) {
      const item = document.createElement("span");
      const number = document.createElement("span");
      item.title = title;
      number.className = "number";
      number.textContent = "–";
      item.append(`${name} `, number);
      this.numbers[name] = number;
      place.append(item);
    }
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("class", "spark");
    this.svg.setAttribute("role", "img");
    this.base = document.createElementNS(SVG, "line");
    for (const [name, value] of [["x1", 0], ["x2", WIDTH], ["y1", HEIGHT - 1], ["y2", HEIGHT - 1]]) {
      this.base.setAttribute(name, value);
    }
    this.curve = document.createElementNS(SVG, "polyline");
    this.svg.append(this.base, this.curve);
    this.svg.setAttribute("aria-label", "No gaps between tokens yet");
    place.append(this.svg);
  }

  show(times) {
    const { numbers } = this;
    numbers["TTFT"].textContent = ms(times.ttft);
    numbers["ITL"].textContent = ms(times.quantile(0.5));
    numbers["ITL P99"].textContent = ms(times.quantile(0.99));
    const received = times.ttft === null ? 0 : times.gaps.length + 1;
    numbers["tokens"].textContent = String(times.tokens ?? received);
    const points = times.gaps.slice(-MOST_POINTS);
    if (!points.length) return;
    const most = Math.max(...points, 1e-6);
    const step = WIDTH / Math.max(points.length - 1, 1);
    const at = (gap, i) => `${(i * step).toFixed(1)},${(HEIGHT - 2 - (gap / most) * (HEIGHT - 4)).toFixed(1)}`;
    this.curve.setAttribute("points", points.map(at).join(" "));
    const [least, middle] = [Math.min(...points), times.quantile(0.5)];
    this.svg.setAttribute(
      "aria-label",
      `Gaps between tokens: from ${ms(least)} to ${ms(most)}, median ${ms(middle)}`,
    );
  }
}
