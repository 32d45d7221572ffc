package cli

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	v1 "redoubt.dev/redoubt/api/redoubt/v1"
	"redoubt.dev/redoubt/validation/baseline"
	"redoubt.dev/redoubt/validation/verdict"
)

func (a *app) baselineCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "baseline",
		Short: "Say what a guest's disks are to hold, and sign it",
		Long: `A guest's baseline says of each file that its rules name what it is: type, permissions, owner, contents (SHA-256), what it
may do (set-id bits, capabilities). It is drafted from what the disks of the running guest hold, signed with an Ed25519 key
that is kept elsewhere, and from then on what ` + "`redoubt validate`" + ` holds the disks to. A draft counts for nothing before it is
signed; an older baseline than the last one is refused.`,
		Example: `  redoubt baseline key web.key                     # once: makes a key, prints what goes into the spec
  redoubt baseline rules > rules.yaml              # the default rules, to change
  redoubt baseline create web-1 --rules rules.yaml
  redoubt baseline show web-1 --draft
  redoubt baseline sign web-1 --key web.key
  redoubt validate web-1
  redoubt baseline accept web-1 disk0p1:/etc/passwd
  redoubt baseline diff web-1                      # what the draft changes
  redoubt baseline sign web-1 --key web.key`,
	}
	c.AddCommand(a.baselineCreate(), a.baselineSign(), a.baselineShow(), a.baselineDiff(), a.baselineAccept(), a.baselineKey(), a.baselineRules())
	return c
}

func (a *app) baselineCreate() *cobra.Command {
	var rules, key string
	var force bool
	c := &cobra.Command{
		Use:   "create NAME",
		Short: "Draft a guest's baseline from what its disks hold now",
		Example: `  redoubt baseline create web-1
  redoubt baseline create web-1 --rules rules.yaml --key web.key   # and sign it at once`,
		Args: names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error {
			var text []byte
			if rules != "" {
				var err error
				if text, err = os.ReadFile(rules); err != nil {
					return usagef("--rules: %v", err)
				}
				if _, err := baseline.ParseRules(text); err != nil {
					return usagef("--rules: %s: %v", rules, err)
				}
			}
			a.progress("reading %s's disks", args[0])
			res, err := a.client().CreateBaseline(c.Context(), &v1.CreateBaselineRequest{Name: args[0], Rules: text, Force: force})
			a.progressEnd()
			if err != nil {
				return err
			}
			return a.drafted(c.Context(), args[0], res.Drafted, key)
		},
	}
	f := c.Flags()
	f.StringVar(&rules, "rules", "", "what is in the baseline (YAML; default: the rules of the last one, or those that `redoubt baseline rules` prints)")
	f.StringVar(&key, "key", "", "sign the draft with this private key (PEM)")
	f.BoolVar(&force, "force", false, "take a moment that is not safe, if no other comes")
	return c
}

// drafted prints what a draft is, and signs it if there is a key.
func (a *app) drafted(ctx context.Context, name string, answer []byte, key string) error {
	var d verdict.Drafted
	if err := json.Unmarshal(answer, &d); err != nil {
		return fmt.Errorf("baseline: the answer: %w", err)
	}
	if a.json && key == "" {
		return a.printJSON(d)
	}
	if !a.json {
		fmt.Fprintf(a.out, "draft of version %d: %d files, %d bytes, SHA-256 %s\n", d.Version, d.Entries, d.Bytes, d.SHA256)
		for _, p := range d.Problems {
			fmt.Fprintf(a.out, "not in it, cannot be read: %s\n", printable(p))
		}
		if len(d.Problems) > 0 {
			fmt.Fprintln(a.out, "what cannot be read deviates at each validation: a rule that leaves it out has ignore: true, its path and its volumes")
		}
	}
	if key == "" {
		fmt.Fprintf(a.out, "it counts when it is signed: `redoubt baseline sign %s --key KEY`\n", name)
		return nil
	}
	return a.sign(ctx, name, key, d.SHA256)
}

func (a *app) baselineSign() *cobra.Command {
	var key, sum string
	c := &cobra.Command{
		Use:   "sign NAME --key FILE",
		Short: "Sign the draft of a guest's baseline: it counts from then on",
		Long: `Signs the draft with an Ed25519 key, in this command: the key goes nowhere. Look at what is signed first
(` + "`redoubt baseline diff`, `redoubt baseline show --draft`" + `).`,
		Example: `  redoubt baseline sign web-1 --key web.key
  redoubt baseline sign web-1 --key web.key --sha256 DIGEST   # only what was looked at`,
		Args: names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error {
			if key == "" {
				return usagef("baseline sign: give --key: `redoubt baseline key FILE` makes one")
			}
			return a.sign(c.Context(), args[0], key, sum)
		},
	}
	c.Flags().StringVar(&key, "key", "", "private key (PKCS#8 PEM, as `redoubt baseline key` or openssl genpkey -algorithm ed25519 make it)")
	c.Flags().StringVar(&sum, "sha256", "", "refuse another draft than the one of this digest")
	return c
}

func (a *app) baselineShow() *cobra.Command {
	var draft, file bool
	c := &cobra.Command{
		Use:   "show NAME",
		Short: "Print a guest's baseline",
		Example: `  redoubt baseline show web-1
  redoubt baseline show web-1 --draft --file > web-1.baseline   # the file itself`,
		Args: names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error {
			text, b, err := a.getBaseline(c.Context(), args[0], draft)
			if err != nil {
				return err
			}
			if file {
				_, err := a.out.Write(text)
				return err
			}
			return a.printBaseline(b)
		},
	}
	c.Flags().BoolVar(&draft, "draft", false, "the one that is not signed yet")
	c.Flags().BoolVar(&file, "file", false, "print the file as it is")
	return c
}

func (a *app) baselineDiff() *cobra.Command {
	return &cobra.Command{
		Use:   "diff NAME",
		Short: "Say what the draft changes of a guest's baseline",
		Long: `Compares the draft (` + "`redoubt baseline create`, `redoubt baseline accept`" + `) with the baseline that counts. What the disks deviate
from it says ` + "`redoubt validate`" + `. The exit status is 1 where they differ.`,
		Example: `  redoubt baseline diff web-1`,
		Args:    names(1, "a guest's name"),
		RunE: func(c *cobra.Command, args []string) error {
			_, old, err := a.getBaseline(c.Context(), args[0], false)
			if err != nil {
				return err
			}
			_, next, err := a.getBaseline(c.Context(), args[0], true)
			if err != nil {
				return err
			}
			d, err := baseline.Diff(old, next, maxShown)
			if err != nil {
				return fmt.Errorf("baseline: %w", err)
			}
			if a.json {
				err = a.printJSON(d)
			} else {
				for _, f := range d.Findings {
					fmt.Fprintln(a.out, f)
				}
				if d.Omitted > 0 {
					fmt.Fprintf(a.out, "and %d more\n", d.Omitted)
				}
			}
			if err == nil && len(d.Findings) > 0 {
				err = exitError(1)
			}
			return err
		},
	}
}

// maxShown bounds what a difference lists.
const maxShown = 100_000

func (a *app) baselineAccept() *cobra.Command {
	var all bool
	var key string
	c := &cobra.Command{
		Use:   "accept NAME PATH... | --all",
		Short: "Draft the next baseline with files as they are now",
		Example: `  redoubt baseline accept web-1 disk0p1:/etc/passwd disk0p1:/usr/bin/vim
  redoubt baseline accept web-1 --all --key web.key`,
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) < 1 || (len(args) == 1) != all {
				return usagef("baseline accept: give a guest's name and paths as `redoubt validate` prints them, or --all: see `redoubt baseline accept --help`")
			}
			for _, p := range args[1:] {
				if _, err := baseline.ParseName(p); err != nil {
					return usagef("baseline accept: %q: use the names that `redoubt validate` prints, such as disk0p1:/etc/passwd", p)
				}
			}
			a.progress("reading %s's disks", args[0])
			res, err := a.client().AcceptBaseline(c.Context(), &v1.AcceptBaselineRequest{Name: args[0], Paths: args[1:]})
			a.progressEnd()
			if err != nil {
				return err
			}
			return a.drafted(c.Context(), args[0], res.Drafted, key)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "all that deviate")
	c.Flags().StringVar(&key, "key", "", "sign the draft with this private key (PEM)")
	return c
}

func (a *app) baselineKey() *cobra.Command {
	return &cobra.Command{
		Use:   "key FILE",
		Short: "Make a key to sign baselines with, or print the public half of one",
		Long: `Makes an Ed25519 key in FILE, which only its owner can read, and prints its public half for the spec's
validation.signers. Of a file that is there it prints the public half. Keep the key away from the host that it is for.`,
		Example: `  redoubt baseline key web.key`,
		Args:    names(1, "a file"),
		RunE: func(_ *cobra.Command, args []string) error {
			key, err := readKey(args[0])
			if errors.Is(err, os.ErrNotExist) {
				key, err = makeKey(args[0])
			}
			if err != nil {
				return err
			}
			public, _ := key.Public().(ed25519.PublicKey)
			if a.json {
				return a.printJSON(map[string]string{"public": baseline.FormatPublicKey(public), "id": baseline.KeyID(public)})
			}
			fmt.Fprintln(a.out, baseline.FormatPublicKey(public))
			return nil
		},
	}
}

func (a *app) baselineRules() *cobra.Command {
	return &cobra.Command{
		Use:     "rules",
		Short:   "Print the default rules: what of a Debian guest is in its baseline",
		Example: `  redoubt baseline rules > rules.yaml`,
		Args:    names(0, "nothing more"),
		RunE: func(*cobra.Command, []string) error {
			text := baseline.DefaultRulesFile()
			if a.json {
				var rules any
				if err := yaml.Unmarshal(text, &rules); err != nil {
					return fmt.Errorf("baseline rules: %w", err)
				}
				return a.printJSON(rules)
			}
			_, err := a.out.Write(text)
			return err
		},
	}
}

func makeKey(path string) (ed25519.PrivateKey, error) {
	key, err := baseline.GenerateKey()
	if err != nil {
		return nil, err
	}
	pem, err := baseline.FormatPrivateKey(key)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	_, err = f.Write(pem)
	return key, errors.Join(err, f.Sync(), f.Close())
}

func readKey(path string) (ed25519.PrivateKey, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	key, err := baseline.ParsePrivateKey(b)
	if err != nil {
		err = usagef("%s: %v", path, err)
	}
	return key, err
}

// getBaseline gets the baseline or the draft, and looks whether it is one.
func (a *app) getBaseline(ctx context.Context, name string, draft bool) ([]byte, *baseline.Baseline, error) {
	a.progress("reading %s's baseline", name)
	res, err := a.client().GetBaseline(ctx, &v1.GetBaselineRequest{Name: name, Draft: draft})
	a.progressEnd()
	if err != nil {
		return nil, nil, err
	}
	b, err := baseline.Open(res.Baseline)
	if err == nil {
		err = b.Check()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("baseline of %s: %w", name, err)
	}
	return res.Baseline, b, nil
}

// sign signs the draft that there is, if it has the digest that is asked for.
func (a *app) sign(ctx context.Context, name, keyFile, sum string) error {
	key, err := readKey(keyFile)
	if err != nil {
		return err
	}
	draft, _, err := a.getBaseline(ctx, name, true)
	if err != nil {
		return err
	}
	if got := digest(draft); sum != "" && sum != got {
		return fmt.Errorf("baseline of %s: the draft has SHA-256 %s, not %s: look at it again (`redoubt baseline diff %s`)", name, got, sum, name)
	}
	signed, err := baseline.Sign(draft, key)
	if err != nil {
		return fmt.Errorf("baseline of %s: %w", name, err)
	}
	public, _ := key.Public().(ed25519.PublicKey)
	res, err := a.client().SignBaseline(ctx, &v1.SignBaselineRequest{Name: name, Signature: signed[len(draft):], Signer: baseline.FormatPublicKey(public)})
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(map[string]any{"version": res.Version, "signer": baseline.FormatPublicKey(public)})
	}
	fmt.Fprintf(a.out, "version %d is %s's baseline, signed by %s\n", res.Version, name, baseline.FormatPublicKey(public))
	return nil
}

func (a *app) printBaseline(b *baseline.Baseline) error {
	type line struct {
		Name   string `json:"name"`
		Mode   string `json:"mode"`
		UID    uint32 `json:"uid"`
		GID    uint32 `json:"gid"`
		Size   int64  `json:"size"`
		SHA256 string `json:"sha256,omitempty"`
		Target string `json:"target,omitempty"`
		Rule   string `json:"rule"`
	}
	var all []line
	for e, err := range b.All() {
		if err != nil {
			return fmt.Errorf("baseline: %w", err)
		}
		l := line{
			Name: e.String(), Mode: fmt.Sprintf("%06o", e.Mode), UID: e.UID, GID: e.GID, Size: e.Size,
			Target: baseline.Escape(e.Target), Rule: b.Rules.RuleOf(e),
		}
		if e.Digest != (baseline.Digest{}) {
			l.SHA256 = fmt.Sprintf("%x", e.Digest)
		}
		all = append(all, l)
	}
	if a.json {
		return a.printJSON(map[string]any{"guest": b.Guest, "version": b.Version, "created": b.Created, "signed": b.Signed(), "entries": all})
	}
	p := &printer{w: tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)}
	state := "a draft"
	if b.Signed() {
		state = "signed"
	}
	p.line("version %d, %s, of %s, %d files", b.Version, state, b.Created.UTC().Format("2006-01-02 15:04:05"), len(all))
	p.line("MODE\tOWNER\tSIZE\tSHA-256\tRULE\tNAME")
	for _, l := range all {
		name := l.Name
		if l.Target != "" {
			name += " -> " + l.Target
		}
		p.line("%s\t%d:%d\t%d\t%.16s\t%s\t%s", l.Mode, l.UID, l.GID, l.Size, l.SHA256, l.Rule, name)
	}
	return errors.Join(p.err, p.w.Flush())
}
