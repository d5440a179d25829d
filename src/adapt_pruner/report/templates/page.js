"use strict";
// Without this script the page shows all there is; with it, figures under the pointer and the model stage by stage.
(() => {
  const tip = document.getElementById("tip");
  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(innerWidth - box.width - 4, x - box.width / 2)) + "px";
    tip.style.top = (y - box.height - 14 < 4 ? y + 18 : y - box.height - 14) + "px";
  };
  const hide = () => { tip.hidden = true; document.querySelectorAll(".here").forEach((dot) => dot.remove()); };

  for (const canvas of document.querySelectorAll(".cells")) {
    for (const title of canvas.querySelectorAll("title")) {
      title.parentNode.dataset.tip = title.textContent;
      title.remove();
    }
    const over = (event) => {
      const text = event.target.dataset && event.target.dataset.tip;
      if (text) show(text, event.clientX, event.clientY); else hide();
    };
    canvas.addEventListener("pointermove", over);
    canvas.addEventListener("pointerdown", over);
    canvas.addEventListener("pointerleave", hide);
  }

  for (const canvas of document.querySelectorAll("[data-tips]")) {
    const points = JSON.parse(canvas.dataset.tips);
    const over = (event) => {
      const box = canvas.getBoundingClientRect();
      let best = null, least = Infinity;
      for (const point of points) {
        const far = Math.abs(point[0] * box.width + box.left - event.clientX) * 4 + Math.abs(point[1] * box.height + box.top - event.clientY);
        if (far < least) { least = far; best = point; }
      }
      if (!best) return;
      hide();
      const dot = document.createElement("span");
      dot.className = "here";
      dot.style.left = best[0] * 100 + "%";
      dot.style.top = best[1] * 100 + "%";
      canvas.append(dot);
      show(best[2], best[0] * box.width + box.left, best[1] * box.height + box.top);
    };
    canvas.addEventListener("pointermove", over);
    canvas.addEventListener("pointerdown", over);
    canvas.addEventListener("pointerleave", hide);
  }
  addEventListener("scroll", hide, { passive: true });

  const slider = document.getElementById("stage");
  if (slider) {
    const names = JSON.parse(slider.dataset.steps), output = document.querySelector("output");
    const turn = () => {
      const at = Number(slider.value);
      output.textContent = names[at];
      slider.setAttribute("aria-valuetext", names[at]);
      for (const piece of document.querySelectorAll("#anatomy .gone[data-group]")) piece.classList.toggle("still", Number(piece.dataset.group) > at);
    };
    slider.closest("div").hidden = false;
    slider.addEventListener("input", turn);
    turn();
  }
})();
