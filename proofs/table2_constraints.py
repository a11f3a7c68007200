"""Table 2 and the rest: each objective's constraint, C_w = -dL/d log pi(y_w) and C_l = dL/d log pi(y_l) (eq. 3).

By differentiating each loss with respect to the two sequence log-likelihoods. Hinges are differentiated on each side of
their kink. Table 2's single C does not fit SimPO (each side has its own length) nor SLiC-HF (its likelihood term adds
lambda to C_w): the constraints proved here are the ones with those factors. PROOFS says where each objective's constraint is
proved; those of the losses per token are claims of other files.
"""

from dataclasses import dataclass

import sympy as sp
from common import prove, sigmoid
from family_gradients import RESPONSE, TOKEN

logp_w, logp_l, ref_w, ref_l = sp.symbols("logp_w logp_l ref_w ref_l", negative=True)
len_w, len_l, beta, tau, lambda_, lambda_d, lambda_u = sp.symbols(
    "len_w len_l beta tau lambda_ lambda_d lambda_u", positive=True
)
gamma, delta, alpha, z0 = sp.symbols("gamma delta alpha z0", real=True)
r_w, r_l = logp_w - ref_w, logp_l - ref_l
mean_w, mean_l = logp_w / len_w, logp_l / len_l
INPUTS = (logp_w, logp_l, ref_w, ref_l, len_w, len_l)


def log_odds(mean: sp.Expr) -> sp.Expr:
    return mean - sp.log(1 - sp.exp(mean))


@dataclass(frozen=True)
class Objective:
    """A loss, its claimed constraints, and its hyper-parameters by the library's names."""

    loss: sp.Expr
    c_w: sp.Expr
    c_l: sp.Expr
    hyper: tuple[sp.Symbol, ...] = ()
    where: str = ""


H_ORPO = log_odds(mean_w) - log_odds(mean_l)
H_R_DPO = beta * (r_w - r_l) + alpha * (len_w - len_l)
H_DPOP = beta * (r_w - r_l + lambda_ * r_w)  # below the reference, where max(0, -r_w) = -r_w
H_SIMPO = beta * mean_w - beta * mean_l - gamma
DPO_C = beta * sigmoid(beta * (r_l - r_w))
MIXTURE = lambda_ * sp.exp(r_l) + 1 - lambda_  # BDPO's, over pi_ref
C_BDPO = beta * sigmoid(beta * (sp.log(MIXTURE) - r_w))
MARGIN_AVG = r_w / len_w - r_l / len_l - 1 / (2 * tau)

CLAIMS: dict[str, list[Objective]] = {
    "nll_pll": [Objective(-logp_w + logp_l, sp.Integer(1), sp.Integer(1))],
    "slic_hf": [
        Objective(delta - logp_w + logp_l - lambda_ * logp_w, 1 + lambda_, sp.Integer(1), (delta, lambda_), "gap < delta"),
        Objective(-lambda_ * logp_w, lambda_, sp.Integer(0), (delta, lambda_), "gap > delta"),
    ],
    "dpo": [Objective(-sp.log(sigmoid(beta * (r_w - r_l))), DPO_C, DPO_C, (beta,))],
    "ipo": [
        Objective((r_w - r_l - 1 / (2 * tau)) ** 2, 2 * (1 / (2 * tau) + r_l - r_w), 2 * (1 / (2 * tau) + r_l - r_w), (tau,))
    ],
    "simpo": [
        Objective(-sp.log(sigmoid(H_SIMPO)), beta / len_w * sigmoid(-H_SIMPO), beta / len_l * sigmoid(-H_SIMPO), (beta, gamma))
    ],
    "r_dpo": [Objective(-sp.log(sigmoid(H_R_DPO)), beta * sigmoid(-H_R_DPO), beta * sigmoid(-H_R_DPO), (beta, alpha))],
    "orpo": [
        Objective(
            -mean_w - lambda_ * sp.log(sigmoid(H_ORPO)),
            (1 + lambda_ * sigmoid(-H_ORPO) / (1 - sp.exp(mean_w))) / len_w,
            lambda_ * sigmoid(-H_ORPO) / (1 - sp.exp(mean_l)) / len_l,
            (lambda_,),
        )
    ],
    "dpop": [
        Objective(-sp.log(sigmoid(beta * (r_w - r_l))), DPO_C, DPO_C, (beta, lambda_), "r_w > 0"),
        Objective(
            -sp.log(sigmoid(H_DPOP)),
            beta * (1 + lambda_) * sigmoid(-H_DPOP),
            beta * sigmoid(-H_DPOP),
            (beta, lambda_),
            "r_w < 0",
        ),
    ],
    "ipo_avg": [Objective(MARGIN_AVG**2, -2 * MARGIN_AVG / len_w, -2 * MARGIN_AVG / len_l, (tau,))],
    "rpo": [
        Objective(-sp.log(sigmoid(beta * (r_w - r_l))) - alpha * mean_w, DPO_C + alpha / len_w, DPO_C, (beta, alpha)),
    ],
    "bdpo": [
        Objective(
            -sp.log(sigmoid(beta * (r_w - sp.log(MIXTURE)))),
            C_BDPO,
            C_BDPO * lambda_ * sp.exp(r_l) / MIXTURE,
            (beta, lambda_),
        )
    ],
}
X_W, X_L = beta * (r_w - z0), beta * (r_l - z0)
KTO = Objective(
    lambda_d * (1 - sigmoid(X_W)) + lambda_u * (1 - sigmoid(-X_L)),
    lambda_d * beta * sigmoid(X_W) * sigmoid(-X_W),
    lambda_u * beta * sigmoid(X_L) * sigmoid(-X_L),
    (beta, lambda_d, lambda_u, z0),
    "one preferred response and one dispreferred, not a pair",
)
# c and BNF's weights w are constants of the gradient; one token of each side
c, w_w, w_l = sp.symbols("c w_w w_l", positive=True)
CONTRASTIVE = Objective(
    c * (-w_w * logp_w / len_w + w_l * logp_l / len_l) / 2,
    c * w_w / (2 * len_w),
    c * w_l / (2 * len_l),
    (),
    "one token of each side, c = 2 sigmoid(beta (r_l - r_w))",
)
HERE = CLAIMS | {"kto": [KTO], "kto_fixed": [KTO], "bnf_contrastive": [CONTRASTIVE]}  # z0 estimated or given: a constant
PROOFS = (
    dict.fromkeys(HERE, "table2_constraints.py")
    | dict.fromkeys(TOKEN | RESPONSE, "family_gradients.py")
    | {
        "log_likelihood": "a1_nll_derivative.py",  # C = 1
        "bnf": "t1_mixture.py",  # C = w
        "bnf_binary": "t2_binary.py",  # the same gradient
    }
)


def main() -> None:
    for name, cases in HERE.items():
        for case in cases:
            where = f", {case.where}" if case.where else ""
            prove(
                f"constraint of {name}{where}: C_w = {case.c_w}, C_l = {case.c_l}",
                "symbolic derivative with respect to each sequence log-likelihood",
                -sp.diff(case.loss, logp_w) - case.c_w,
                sp.diff(case.loss, logp_l) - case.c_l,
            )


if __name__ == "__main__":
    main()
