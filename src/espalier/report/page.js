// Drag moves a drawing, the buttons (or Ctrl with the wheel, or a pinch) zoom it, a double click fits it.
for (const figure of document.querySelectorAll("figure[data-drawing]")) {
  const view = figure.querySelector(".view"), svg = view.querySelector("svg");
  const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
  let x = 0, y = 0, scale = 1;
  const show = () => {
    const w = view.clientWidth / scale, h = view.clientHeight / scale;
    svg.setAttribute("viewBox", `${x} ${y} ${w} ${h}`);
  };
  const centre = (wanted, top) => {
    scale = wanted;
    x = (width - view.clientWidth / scale) / 2;
    y = top ? 0 : (height - view.clientHeight / scale) / 2;
    show();
  };
  const whole = () => Math.min(view.clientWidth / width, view.clientHeight / height);
  const fit = () => centre(Math.min(whole(), 1.6), false);
  const open = () => (whole() > 0.4 ? fit() : centre(Math.max(Math.min(view.clientWidth / width, 1), 0.5), true));
  const zoom = (factor, px = view.clientWidth / 2, py = view.clientHeight / 2) => {
    const next = Math.min(Math.max(scale * factor, 0.02), 8);
    x += px / scale - px / next;
    y += py / scale - py / next;
    scale = next;
    show();
  };
  svg.setAttribute("preserveAspectRatio", "xMidYMid meet");
  view.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const box = view.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  view.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch" && !event.isPrimary) return;
    view.setPointerCapture(event.pointerId);
    view.classList.add("drag");
  });
  view.addEventListener("pointermove", (event) => {
    if (!view.classList.contains("drag")) return;
    x -= event.movementX / scale;
    y -= event.movementY / scale;
    show();
  });
  for (const end of ["pointerup", "pointercancel"]) view.addEventListener(end, () => view.classList.remove("drag"));
  view.addEventListener("dblclick", fit);
  figure.querySelector("[data-do=in]").addEventListener("click", () => zoom(1.3));
  figure.querySelector("[data-do=out]").addEventListener("click", () => zoom(1 / 1.3));
  figure.querySelector("[data-do=fit]").addEventListener("click", fit);
  figure.querySelector("[data-do=full]").addEventListener("click", () =>
    document.fullscreenElement ? document.exitFullscreen() : figure.requestFullscreen());
  new ResizeObserver(open).observe(view);
}
