// The ledger of all viewers, added up from their panels.

import { h, setText } from "./dom.js";
import { money } from "./format.js";

const COLUMNS = ["held", "captured", "released", "open"];

export class Books {
  #viewers;
  #rows = document.getElementById("books-rows");
  #sum = document.getElementById("books-sum");
  #balance = document.getElementById("books-balance");

  /** @param {import("./viewer.js").ViewerPanel[]} viewers */
  constructor(viewers) {
    this.#viewers = viewers;
    for (const viewer of viewers) viewer.addEventListener("change", () => this.show());
    document.getElementById("books").hidden = false;
    this.show();
  }

  show() {
    const ledgers = this.#viewers.map((viewer) => viewer.board.ledger(viewer.user.id));
    const sums = Object.fromEntries(
      COLUMNS.map((column) => [column, ledgers.reduce((sum, ledger) => sum + ledger[column], 0)]),
    );
    this.#rows.replaceChildren(
      ...this.#viewers.map((viewer, index) => row(viewer.user.name, viewer.user.id, ledgers[index])),
    );
    this.#sum.replaceChildren(row("All viewers", "", sums));
    const balanced = this.#viewers.every((viewer) => viewer.board.balanced);
    setText(this.#balance, balanced ? "Balanced" : "Does not balance");
    this.#balance.dataset.tone = balanced ? "done" : "bad";
  }
}

function row(name, userId, ledger) {
  return h(
    "tr",
    { data: { user: userId } },
    h("th", { scope: "row" }, name),
    ...COLUMNS.map((column) => h("td", { data: { figure: column } }, money(ledger[column]))),
  );
}
