//! The pages that people read.

use std::fmt::{self, Write};

use super::report::{
    Applied, AppliedPolicy, AppliedTo, Change, DryRun, DryRunWorkload, Explanation, Record,
    TracedPolicy,
};

/// Lines of one kind that a page has at most; `--json` has them all.
const MOST_LINES: usize = 40;

/// `ringfence policies`.
pub fn applied(applied: &Applied) -> String {
    text(|out| {
        for workload in &applied.workloads {
            applied_to(out, workload)?;
        }
        if applied.workloads.is_empty() {
            writeln!(out, "no workload on this node")?;
        }
        writeln!(out, "\nkernel tables")?;
        for usage in &applied.tables {
            writeln!(
                out,
                "  {:<12} {:>8} of {}",
                usage.table, usage.used, usage.limit
            )?;
        }
        writeln!(out, "\nnot visible here")?;
        for spot in &applied.blind_spots {
            writeln!(out, "  - {spot}")?;
        }
        Ok(())
    })
}

fn applied_to(out: &mut String, to: &AppliedTo) -> fmt::Result {
    writeln!(out, "{}", to.workload)?;
    let mode = match to.mode.as_str() {
        "strict" => "STRICT: plaintext is refused",
        "permissive" => "PERMISSIVE: plaintext is judged, without an identity",
        other => other,
    };
    writeln!(out, "  mode     {mode}")?;
    let set = match to.set {
        0 => "none: everything is denied".to_owned(),
        set => format!("{set} ({} of {} terms)", to.terms, to.most_terms),
    };
    writeln!(
        out,
        "  set      {set}{}",
        if to.pending {
            ", a newer one is on its way"
        } else {
            ""
        }
    )?;
    if !to.shared_with.is_empty() {
        writeln!(out, "  shared   with {}", to.shared_with.join(", "))?;
    }
    for problem in &to.problems {
        writeln!(out, "  PROBLEM  {problem}")?;
    }
    if to.policies.is_empty() && to.problems.is_empty() && to.set != 0 {
        writeln!(
            out,
            "  no policy applies: whatever the mode admits is allowed"
        )?;
    }
    for AppliedPolicy {
        name,
        scope,
        action,
        dry_run,
        terms,
        rules,
        notes,
    } in &to.policies
    {
        let dry_run = if *dry_run { ", DRY RUN" } else { "" };
        writeln!(
            out,
            "  {action:<5}    {name} ({scope}, {terms} terms{dry_run})"
        )?;
        let numbered = rules.iter().enumerate();
        limited(
            out,
            "             ",
            numbered.map(|(n, rule)| format!("rule {n}: {rule}")),
        )?;
        for note in notes {
            writeln!(out, "             NOTE: {note}")?;
        }
    }
    Ok(())
}

/// `ringfence authz explain`.
pub fn explanation(explanation: &Explanation) -> String {
    text(|out| {
        let Explanation {
            identity,
            source,
            workload,
            destination,
            set,
            mode,
            reference,
            kernel,
            difference,
            with_dry_run,
            policies,
            notes,
        } = explanation;
        let who = identity.as_deref().unwrap_or("nobody (plaintext)");
        writeln!(out, "from       {who}, {source}")?;
        writeln!(
            out,
            "to         {workload}, {destination} (policy set {set}, {mode})"
        )?;
        writeln!(out, "reference  {}", reference.line())?;
        writeln!(out, "kernel     {}", kernel.line())?;
        match difference {
            None => writeln!(out, "           the two agree")?,
            Some(difference) => writeln!(out, "DIFFERENT  {}", difference.what)?,
        }
        if let Some(decision) = with_dry_run {
            writeln!(out, "dry run    {} if it were enforced", decision.line())?;
        }
        for note in notes {
            writeln!(out, "NOTE       {note}")?;
        }
        if policies.is_empty() {
            return writeln!(out, "\nno policy applies to the workload");
        }
        writeln!(out, "\npolicies")?;
        // What decides first, then what is enforced.
        let mut sorted: Vec<&TracedPolicy> = policies.iter().collect();
        sorted.sort_by_key(|policy| (!policy.decides, policy.dry_run));
        let shown = sorted.len().min(MOST_LINES);
        for policy in sorted.iter().take(shown) {
            traced(out, policy)?;
        }
        more(out, "  ", sorted.len().saturating_sub(shown))
    })
}

fn traced(out: &mut String, policy: &TracedPolicy) -> fmt::Result {
    let matching = policy.rules.iter().position(|rule| rule.matches);
    let says = match (policy.decides, matching) {
        (true, _) => "DECIDES",
        (false, Some(_)) => "matches, and another one decides",
        (false, None) if policy.rules.is_empty() => "has no rules: it never matches",
        (false, None) => "does not match",
    };
    let dry_run = if policy.dry_run { " (dry run)" } else { "" };
    writeln!(
        out,
        "  {:<5} {}{dry_run}: {says}",
        policy.action, policy.name
    )?;
    for (number, rule) in policy.rules.iter().enumerate().take(MOST_LINES) {
        if rule.matches {
            writeln!(out, "    rule {number} matches")?;
        } else {
            writeln!(out, "    rule {number} does not:")?;
            limited(out, "      ", rule.why_not.iter().cloned())?;
        }
    }
    more(out, "    ", policy.rules.len().saturating_sub(MOST_LINES))
}

/// `ringfence authz dry-run`.
pub fn dry_run(report: &DryRun) -> String {
    text(|out| {
        writeln!(out, "nothing was applied\n\npolicies of the file")?;
        for policy in &report.policies {
            writeln!(out, "  {:<9}  {}", policy.what, policy.summary)?;
            let to = match policy.applies_to.as_slice() {
                [] => "no workload of this node".to_owned(),
                some => some.join(", "),
            };
            writeln!(out, "             applies to {to}")?;
        }
        if report.policies.is_empty() {
            writeln!(out, "  none that is enforced at L4")?;
        }
        for warning in &report.warnings {
            writeln!(out, "WARNING {warning}")?;
        }
        if report.workloads.is_empty() {
            return writeln!(out, "\nno workload of this node is concerned");
        }
        report
            .workloads
            .iter()
            .try_for_each(|workload| dry_run_workload(out, workload))
    })
}

fn dry_run_workload(out: &mut String, workload: &DryRunWorkload) -> fmt::Result {
    let [streams, plaintext, verdicts] = workload.judged;
    writeln!(
        out,
        "\n{}: {streams} live streams, {plaintext} plaintext connections, {verdicts} recent verdicts",
        workload.workload
    )?;
    if workload.mode_before != workload.mode_after {
        writeln!(
            out,
            "  mode {} -> {}",
            workload.mode_before, workload.mode_after
        )?;
    }
    for problem in &workload.problems {
        writeln!(out, "  PROBLEM: everything would be denied: {problem}")?;
    }
    for (title, allows) in [("newly denied", false), ("newly allowed", true)] {
        let changes: Vec<&Change> = workload
            .changes
            .iter()
            .filter(|change| change.after.allows() == allows)
            .collect();
        let nothing = if changes.is_empty() { " nothing" } else { "" };
        writeln!(out, "  {title}:{nothing}")?;
        limited(out, "    ", changes.iter().map(|change| line_of(change)))?;
    }
    Ok(())
}

fn line_of(change: &Change) -> String {
    let what = match (change.kind.as_str(), &change.stream) {
        ("stream", Some(id)) => format!("stream {id} WOULD BE CUT"),
        ("plaintext", _) => "plaintext connection WOULD BE CUT".to_owned(),
        _ => format!("{} recent", change.count),
    };
    format!(
        "{what}: {} ({}) -> {}: {}; was {}",
        change.identity.as_deref().unwrap_or("plaintext"),
        change.source,
        change.destination,
        change.after.line(),
        change.before.line()
    )
}

/// A line of `ringfence authz log`.
pub fn record(record: &Record) -> String {
    let mut line = format!(
        "{} {:<5} {} {} -> {} {} ({})",
        record.time,
        record.decision.verdict.to_uppercase(),
        record.source,
        record.source_identity.as_deref().unwrap_or("-"),
        record.destination,
        workload(&record.destination_namespace, &record.destination_workload),
        record.decision.reason,
    );
    // Writing to a String cannot fail.
    if let Some(policy) = &record.decision.policy {
        let _ = write!(line, " by {policy}");
    }
    if let Some(rule) = record.decision.rule {
        let _ = write!(line, ", rule {rule}");
    }
    let _ = write!(line, " [{}, {}]", record.direction, record.hook);
    if let Some(dry_run) = &record.dry_run {
        let _ = write!(line, " dry run: {}", dry_run.line());
    }
    line
}

fn workload(namespace: &Option<String>, name: &Option<String>) -> String {
    match (namespace, name) {
        (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
        _ => "-".into(),
    }
}

fn limited(out: &mut String, indent: &str, lines: impl Iterator<Item = String>) -> fmt::Result {
    let mut left = 0;
    for (number, line) in lines.enumerate() {
        if number < MOST_LINES {
            writeln!(out, "{indent}{line}")?;
        } else {
            left += 1;
        }
    }
    more(out, indent, left)
}

fn more(out: &mut String, indent: &str, left: usize) -> fmt::Result {
    match left {
        0 => Ok(()),
        left => writeln!(out, "{indent}and {left} more (--json has all)"),
    }
}

fn text(write: impl FnOnce(&mut String) -> fmt::Result) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out);
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::report::{Decision, TracedRule};
    use super::*;

    fn decision(verdict: &str, policy: Option<&str>) -> Decision {
        Decision {
            verdict: verdict.into(),
            reason: "allowed".into(),
            policy: policy.map(Into::into),
            rule: policy.map(|_| 0),
        }
    }

    fn sample() -> Explanation {
        Explanation {
            identity: None,
            source: "10.0.0.1".parse().unwrap(),
            workload: "demo/web".into(),
            destination: "10.0.0.2:80".parse().unwrap(),
            set: 7,
            mode: "permissive".into(),
            reference: decision("allow", Some("demo/yes")),
            kernel: decision("allow", Some("demo/yes")),
            difference: None,
            with_dry_run: None,
            policies: vec![
                TracedPolicy {
                    name: "demo/no".into(),
                    action: "DENY".into(),
                    dry_run: false,
                    decides: false,
                    rules: vec![TracedRule {
                        matches: false,
                        why_not: vec!["destination_ports: 80 is none of [81]".into()],
                    }],
                },
                TracedPolicy {
                    name: "demo/yes".into(),
                    action: "ALLOW".into(),
                    dry_run: false,
                    decides: true,
                    rules: vec![TracedRule {
                        matches: true,
                        why_not: Vec::new(),
                    }],
                },
            ],
            notes: Vec::new(),
        }
    }

    #[test]
    fn explanation_says_both_verdicts_and_why_the_others_do_not_match() {
        let page = explanation(&sample());
        assert!(
            page.contains("kernel     ALLOW (allowed) by demo/yes, rule 0"),
            "{page}"
        );
        assert!(page.contains("the two agree"), "{page}");
        assert!(page.contains("80 is none of [81]"), "{page}");
        let decides = page.find("demo/yes: DECIDES").unwrap();
        assert!(
            decides < page.find("demo/no: does not match").unwrap(),
            "{page}"
        );
    }

    #[test]
    fn difference_is_never_said_to_agree() {
        let mut sample = sample();
        sample.difference = Some(super::super::report::Difference {
            expected: false,
            what: "report it".into(),
        });
        let page = explanation(&sample);
        assert!(
            page.contains("DIFFERENT  report it") && !page.contains("agree"),
            "{page}"
        );
    }

    #[test]
    fn record_is_one_line_and_its_json_has_ztunnels_names() {
        let record = Record {
            time: "2026-01-31T08:00:00Z".into(),
            number: 3,
            decision: decision("deny", Some("demo/no")),
            direction: "inbound".into(),
            hook: "plaintext".into(),
            connection_security_policy: "none".into(),
            source: "10.0.0.1:5".into(),
            source_workload: None,
            source_namespace: None,
            source_identity: None,
            destination: "10.0.0.2:80".into(),
            destination_workload: Some("web".into()),
            destination_namespace: Some("demo".into()),
            dry_run: Some(decision("allow", None)),
        };
        let line = super::record(&record);
        assert!(
            !line.contains('\n') && line.contains("DENY  10.0.0.1:5"),
            "{line}"
        );
        assert!(line.contains("dry run: ALLOW"), "{line}");
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!(json["src.addr"], "10.0.0.1:5");
        assert_eq!(json["dst.workload"], "web");
        assert_eq!(json["policy"], "demo/no");
        let back: Record = serde_json::from_value(json).unwrap();
        assert_eq!(back, record);
    }

    #[test]
    fn long_lists_are_cut_and_say_so() {
        let mut out = String::new();
        limited(&mut out, "", (0..100).map(|n| n.to_string())).unwrap();
        assert_eq!(out.lines().count(), MOST_LINES + 1);
        assert!(out.contains("and 60 more"), "{out}");
    }
}
