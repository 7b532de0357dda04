"""The closed list of 38 categories of examination, and the names under which people order them.

The paper counts 38 categories and does not name them (Baichuan-M3, arXiv 2602.06570, on ScanBench); these are ours.
"""

from __future__ import annotations

import functools
import re

CATEGORIES = (
    "full_blood_count",
    "electrolytes_and_renal_function",
    "liver_function",
    "glucose_and_lipids",
    "cardiac_markers",
    "coagulation",
    "inflammatory_markers",
    "blood_gas",
    "iron_and_vitamins",
    "thyroid_function",
    "other_hormones",
    "autoantibodies",
    "tumour_markers",
    "proteins_and_immunoglobulins",
    "haemolysis_and_blood_film",
    "blood_culture",
    "infection_serology",
    "urine_tests",
    "pregnancy_test",
    "stool_tests",
    "swab_and_sputum",
    "cerebrospinal_fluid",
    "joint_and_cavity_fluid",
    "drug_levels_and_toxicology",
    "genetic_tests",
    "biopsy_and_bone_marrow",
    "ecg",
    "cardiac_stress_and_catheter",
    "echocardiography",
    "plain_radiography",
    "ultrasound",
    "ct",
    "mri",
    "nuclear_medicine_and_bone_density",
    "endoscopy",
    "lung_function",
    "neurophysiology",
    "bedside_and_functional_tests",
)

# Ordered rules: the first that has a phrase in a name gives its category. So the narrower stand above ("CT-guided
# biopsy" is a biopsy, "CSF glucose" no glucose). A phrase is words in a row, "*" ends a beginning of a word; plural and
# British spelling are levelled on both sides. A name that no rule knows is "unknown": a test is never guessed.
_RULES: tuple[tuple[str, str], ...] = (
    (
        "bedside_and_functional_tests",
        "non stress*, nonstress*, nst, sweat*",
    ),
    (
        "autoantibodies",
        "celiac*",
    ),
    (
        "blood_gas",
        "blood gas*, abg, vbg",
    ),
    (
        "endoscopy",
        "endoscop*, colonoscop*, gastroscop*, sigmoidoscop*, bronchoscop*, cystoscop*, ureteroscop*, "
        "hysteroscop*, laparoscop*, arthroscop*, colposcop*, laryngoscop*, pharyngoscop*, nasopharyngoscop*, "
        "nasendoscop*, rhinoscop*, enteroscop*, proctoscop*, anoscop*, thoracoscop*, mediastinoscop*, "
        "esophagoscop*, esophagogastroduodenoscop*, panendoscop*, egd, ogd, ercp, eus, bronchoalveolar lavage",
    ),
    (
        "cardiac_stress_and_catheter",
        "nuclear stress*, myocardial perfusion, stress echo*, stress mri, stress test*",
    ),
    (
        "biopsy_and_bone_marrow",
        "biops*, histopatholog*, histolog*, fine needle aspir*, fna, fnac, bone marrow*, marrow aspir*, "
        "pap smear, pap test, papanicolaou, cervical smear, cervical cytolog*, thin prep, flow cytometr*, "
        "immunophenotyp*, trephine, immunohistochem*, immunofluorescence microscop*, frozen section",
    ),
    (
        "nuclear_medicine_and_bone_density",
        "pet, spect, bone scan, scintigra*, scintiscan, vq scan, v q, ventilation perfusion, dexa, dxa, "
        "bone densit*, bone mineral densit*, densitometr*, hida, dmsa, mag3, muga, dat scan, datscan, "
        "thyroid uptake, iodine uptake, radioiodine, radioactive iodine, gallium scan, octreotide scan, "
        "octreoscan, technetium*, sestamibi, meckel scan, nuclear medicine*, nuclear scan*, nuclear imaging, "
        "nuclear stud*, renogra*, thyroid scan, tagged rbc, tagged red*, mibg, radionuclide*",
    ),
    (
        "mri",
        "mri, mra, mrv, mrcp, fmri, mr, magnetic resonance, mrt",
    ),
    (
        "ct",
        "ct, cta, ctpa, ctv, ctkub, cect, ncct, hrct, ldct, cat scan, cbct, ccta, tomogra*, computed tomogra*",
    ),
    (
        "cardiac_stress_and_catheter",
        "catheteri*, cath, coronary angio*, angiogra*, arteriogra*, aortogra*, venogra*, exercise tolerance, "
        "treadmill, exercise ecg, exercise ekg, exercise electro*, exercise stress, dobutamine, "
        "electrophysiolog* stud*, ep study, fractional flow reserve, stress ecg, stress ekg, ett",
    ),
    (
        "echocardiography",
        "echo, echocardio*, tte, tee, toe, transthoracic, transesophageal, bubble study",
    ),
    (
        "neurophysiology",
        "eeg, electroencephalo*, emg, electromyo*, ncs, ncv, nerve conduction, polysomno*, sleep study, "
        "evoked potential*, vep, baer, abr, actigra*, mslt, multiple sleep latency, nerve stimulation, "
        "electroretino*, erg, electronystagmo*, videonystagmo*",
    ),
    (
        "ultrasound",
        "ultrasound*, ultrasono*, sonogra*, sono, us, usg, uss, pocus, doppler, duplex, efast, fast exam*, "
        "fast scan, bladder scan*, fibroscan, elastogra*, tvus, tvs, nuchal translucenc*, biophysical profile",
    ),
    (
        "plain_radiography",
        "x ray, xray, xr, cxr, axr, kub, radiogra*, roentgen*, mammogra*, tomosynthes*, barium*, fluoroscop*, "
        "gi series, video swallow, videofluoroscop*, swallow study, esophagra*, gastrografin, contrast enema, "
        "pyelogra*, ivp, ivu, urogra*, urethrogra*, cystogra*, cystourethrogra*, vcug, mcug, hysterosalpingo*, "
        "hsg, skeletal survey, orthopantomo*, opg, plain film, chest film, abdominal film, defecogra*, "
        "myelogra*, arthrogra*, sialogra*, lymphangiogra*, dacryocysto*, cephalogra*",
    ),
    (
        "ecg",
        "ecg, ekg, electrocardio*, holter, telemetry, cardiac monitor*, rhythm strip, loop recorder, "
        "event monitor*, event recorder, 12 lead, cardiac rhythm",
    ),
    (
        "lung_function",
        "spirometr*, pulmonary function*, pft, lung function*, dlco, tlco, diffusi* capacit*, transfer factor, "
        "peak flow, pefr, expiratory flow, feno, nitric oxide, methacholine, mannitol challenge, "
        "bronchial provocation, bronchial challenge, bronchodilat*, body plethysmo*, lung volume*, fev1*, fvc, "
        "total lung capacity, residual volume, minute walk*, 6mwt, cardiopulmonary exercise, cpet, "
        "inspiratory pressure, vital capacity",
    ),
    (
        "pregnancy_test",
        "pregnancy, hcg, bhcg, beta hcg, b hcg, gonadotropin beta, chorionic gonadotropin",
    ),
    (
        "drug_levels_and_toxicology",
        "tox, toxicol*, drug screen*, drug test*, drug level*, drug monitor*, drug panel, drug of abuse, uds, "
        "alcohol, ethanol, bac, lithium, digoxin, phenytoin, valpro*, carbamazepine, phenobarb*, levetiracetam, "
        "lamotrigine, vancomycin, gentamicin, tobramycin, amikacin, tacrolimus, cyclosporin*, ciclosporin*, "
        "sirolimus, theophylline, paracetamol, acetaminophen, apap, salicylate*, aspirin level, "
        "methotrexate level, lead level, blood lead, serum lead, mercury, arsenic, heavy metal*, "
        "carbon monoxide, carboxyhemoglobin*, cohb, cholinesterase, methanol, ethylene glycol, opiate*, opioid*, "
        "cocaine, amphetamine*, benzodiazepine*, barbiturate*, cannabi*, thiopurine metabolite*, osmolal gap, "
        "osmolar gap, trough level, therapeutic drug",
    ),
    (
        "cerebrospinal_fluid",
        "csf, lumbar puncture, lp, spinal tap, cerebrospinal*, spinal fluid, oligoclonal*, opening pressure, 14 3 3",
    ),
    (
        "joint_and_cavity_fluid",
        "synovial*, arthrocentes*, joint aspir*, joint fluid, joint tap, pleural fluid, pleural tap, "
        "pleural aspir*, thoracentes*, thoracocentes*, paracentes*, ascit*, peritoneal*, pericardial fluid, "
        "pericardiocentes*, saag, knee aspir*, hip aspir*, wrist aspir*, bursa*, diagnostic tap, body fluid, "
        "cyst aspir*, fluid cytolog*, effusion*",
    ),
    (
        "other_hormones",
        "urin* free cortisol, urin* cortisol, urin* metanephrine*, urin* catecholamine*, urin* vma, "
        "urin* 5 hiaa, 24 hour urin* cortisol, 24 hour urin* free cortisol, 24 hour urin* metanephrine*, "
        "vanillylmandel*, 5 hiaa, fractionated metanephrine*, metanephrine*",
    ),
    (
        "swab_and_sputum",
        "urin* naat, urin* pcr, urethral*, cervical culture, high vaginal, chlamydia*, gonorr*",
    ),
    (
        "urine_tests",
        "urin*, ua, u a, upep, msu, dipstick, uacr, acr, upcr, midstream, proteinuria, microalbumin*, "
        "albumin creatinine ratio, protein creatinine ratio, albumin to creatinine, protein to creatinine, "
        "bence jones, fena, creatinine clearance",
    ),
    (
        "stool_tests",
        "stool*, fecal*, feces, fobt, fit test, gfobt, calprotectin, ova and parasite*, ova parasite*, o&p, "
        "o and p, difficile, c diff, cdiff, guaiac, occult blood, hemoccult, pancreatic elastase, "
        "immunochemical test",
    ),
    (
        "blood_culture",
        "blood culture*, blood and urine culture*, culture of blood, bacterial culture of blood, bcx",
    ),
    (
        "infection_serology",
        "hiv*, cd4*, viral load, hepatitis*, hbv*, hcv*, hav, hev, hbsag, hbs*, hbc*, hbe*, syphilis, rpr, vdrl, "
        "fta*, treponem*, tpha, tppa, lyme, borrelia*, toxoplasm*, cmv, cytomegalo*, ebv, epstein barr, "
        "monospot, mono spot, mono test, heterophil*, aso, asot, antistreptolysin*, anti streptolysin, "
        "antistrepto*, anti dnase, dnase b, serolog*, rubella, measles, mumps, varicella*, vzv, brucella*, "
        "widal, dengue, malaria antigen, malaria rapid, malaria rdt, cryptococc*, quantiferon*, igra, "
        "interferon gamma, t spot, tspot, tuberculin, mantoux, ppd, tst, tb test*, tb skin, tb screen*, elisa, "
        "western blot, torch, histoplasm*, coccidioid*, blastomyc*, aspergill*, galactomannan, beta d glucan, "
        "sti, std, sexually transmitted, legionella*, mycoplasma*, parvovirus*, hsv*, herpes*, leptospir*, "
        "rickettsi*, ehrlichia*, babesia*, coxiella*, bartonella*, west nile, zika, chikungunya, strongyloid*, "
        "schistosom*, cysticerc*, echinococc*, hpv*, infectious disease*, infection screen*, htlv*, "
        "infectious mononucleosis, trypanosom*, chagas, leishmania*, trichinell*, toxocara*, pylori serolog*, "
        "pylori antibod*",
    ),
    (
        "bedside_and_functional_tests",
        "urea breath, hydrogen breath, breath test*, skin prick, prick test*, patch test*, allergy skin, "
        "allergy test*, skin test*, depression screen*, anxiety screen*, adhd screen*, autism screen*, gad 7, "
        "cage",
    ),
    (
        "swab_and_sputum",
        "swab*, sputum*, throat culture*, wound culture*, viral culture*, fungal culture*, skin scrap*, "
        "nail clip*, nail scrap*, koh, potassium hydroxide, gram stain*, rapid strep*, strep test*, "
        "strep antigen, strep a, radt, nasopharyng*, nasal*, naat, nucleic acid ampl*, afb*, acid fast*, tzanck, "
        "wet mount, wet prep, saline mount, whiff, vaginal ph, vaginal discharge, vaginal fluid*, "
        "vaginal culture, genital culture*, rapid antigen*, rapid influenza*, rapid flu, influenza*, flu test*, "
        "covid*, sars*, rsv, respiratory panel, respiratory viral, respiratory pathogen*, viral panel, "
        "viral pcr, dark field*, darkfield*, trichomon*, group b strep*, gbs, scraping*, pus culture*, "
        "abscess culture*, tissue culture*, microscopy culture*, culture*, xpert, genexpert, mrsa*, "
        "conjunctival*, pertussis*",
    ),
    (
        "coagulation",
        "factor v leiden, factor assay*, factor viii*, factor ix*, factor level*, factor x*, von willebrand*, "
        "vwf, thrombophil*, prothrombin*, pt, inr, aptt, ptt, partial thromboplastin, coag*, d dimer*, ddimer, "
        "dimer, fibrinogen, fdp, fibrin degradation, fibrin split, bleeding time, clotting*, protein c, "
        "protein s, antithrombin, anti xa, thrombin time, mixing stud*, platelet function, platelet aggreg*, "
        "thromboelasto*, teg, rotem, hit antibod*, pf4",
    ),
    (
        "genetic_tests",
        "genetic*, karyotyp*, gene, mutation*, dna sequenc*, dna test*, chromosom*, fish, microarray*, exome, "
        "genom*, brca*, hla*, cftr, jak2, bcr abl, trinucleotide, cag repeat*, fragile x, amniocentes*, "
        "chorionic villus, cvs, cell free dna, nipt, sequencing, methylation*, apoe, hfe, molecular test*, "
        "newborn screen*, microsatellite*, egfr mutation, sry, methyltransferase, tpmt",
    ),
    (
        "tumour_markers",
        "tumor marker*, psa, prostate specific*, cea, carcinoembryonic*, ca 125, ca125, ca 19*, ca19*, ca 15*, "
        "ca15*, ca 27*, afp, alpha feto*, alphafeto*, alpha fp, chromogranin*, thyroglobulin level, "
        "neuron specific enolase, nse, he4",
    ),
    (
        "haemolysis_and_blood_film",
        "hemoglobin electroph*, hb electroph*, hgb electroph*, smear*, blood film*, thick and thin, thin film*, "
        "thick film*, malaria*, parasite*, reticulocyt*, retic, haptoglobin*, coomb*, antiglobulin*, dat, "
        "lactate dehydrogenase*, ldh, lactic dehydrogenase, hemolysis*, hemolytic*, osmotic fragil*, g6pd, "
        "glucose 6 phosphate*, sickl*, sickledex, type and screen, type and cross*, crossmatch*, cross match*, "
        "group and save, group and hold, group and screen, blood group*, blood typ*, abo, rh typ*, rhesus*, "
        "rh factor, kleihauer*, pyruvate kinase, cold agglutinin*",
    ),
    (
        "proteins_and_immunoglobulins",
        "electroph*, spep, immunofixation, immunoglobulin*, light chain*, paraprotein*, m protein, ige, "
        "iga level*, igg level*, igm level*, igg4*, quantitative ig*, serum ig*, rast, specific ige, allergen*, "
        "complement*, c3*, c4, ch50, c1 esterase, c1 inhibitor, alpha 1 antitrypsin, antitrypsin, a1at, "
        "ceruloplasmin, total protein, serum protein, microglobulin, tryptase, cryoglobulin*, amyloid a, "
        "globulin*, prealbumin, ace level, angiotensin converting, serum ace, lymphocyte subset*, "
        "immunodeficien*",
    ),
    (
        "autoantibodies",
        "thyroid antibod*, antithyroid*, tpo, thyroperoxidase*, thyroid peroxidase*, trab, tsi, "
        "thyroid stimulating immuno*, tsh receptor*, thyroglobulin antibod*, ana, anf, antinuclear*, dsdna, "
        "ds dna, double stranded, anti, anca*, c anca, p anca, rheumatoid factor*, rf, ccp, acpa, citrullinat*, "
        "autoantibod*, autoimmun*, ttg*, transglutaminase*, endomysial*, gliadin*, celiac*, gad, gad65, islet*, "
        "acetylcholine receptor*, achr, musk, calcium channel antibod*, phospholipid*, cardiolipin*, lupus*, "
        "smooth muscle antibod*, mitochondrial antibod*, ama, asma, lkm*, ena, ssa, ssb, ro, scl 70, jo 1, "
        "centromere*, intrinsic factor*, parietal cell*, aquaporin*, nmo*, mog, nmda*, paraneoplastic*, "
        "ganglioside*, gq1b, gm1, histone*, smith, myositis*, rheumatolog*, desmoglein*, gbm, "
        "glomerular basement*, pla2r, glycoprotein, connective tissue*, vasculitis*, antimitochondrial*, "
        "antineutro*, anticentro*, antismooth*, antidsdna, anticcp, antiparietal*, antiribo*, antihistone*, "
        "antibod*",
    ),
    (
        "other_hormones",
        "cortisol*, acth, corticotrop*, adrenocortico*, dexamethasone*, synacthen, cosyntropin, aldosterone*, "
        "renin*, catecholamine*, prolactin*, fsh, follicle stimulating*, lh, luteiniz*, luteinis*, estradiol*, "
        "estrogen*, e2, progesterone*, hydroxyprogesterone*, 17 oh*, testosterone*, dhea*, dehydroepi*, "
        "androstenedione*, androgen*, growth hormone, gh, igf*, insulin like*, insulin*, c peptide*, cpeptide, "
        "pth*, parathyroid*, parathormone, calcitonin*, gastrin*, amh, antimullerian*, anti mullerian*, "
        "inhibin*, shbg, sex hormone*, adh, vasopressin*, copeptin*, erythropoietin*, epo, glucagon*, "
        "pituitary*, water deprivation*, hormon*, vip, vasoactive*, adrenal function, secretin*, melatonin",
    ),
    (
        "thyroid_function",
        "tsh, thyroid stimulating*, thyrotropin*, t3, t4, ft3, ft4, free t3, free t4, thyroxine*, triiodo*, tft, "
        "thyroid*",
    ),
    (
        "blood_gas",
        "abg, vbg, cbg, gas, blood gas*, bloodgas*, arterial gas*, gasometr*, lactate*, lactic acid*, paco2, "
        "pao2, pco2, po2, base excess, oximetry co, cooximetr*, co oximetr*, methemoglobin*, a a gradient, ph, "
        "blood ph",
    ),
    (
        "cardiac_markers",
        "trop, tropon*, hs tn*, hstn*, tnt, tni, ck mb, ckmb, bnp, probnp, nt pro bnp, ntprobnp, natriuretic*, "
        "creatine kinase*, creatine phosphokinase*, cpk, ck, myoglobin*, cardiac enzyme*, cardiac marker*, "
        "cardiac biomarker*, cardiac injur*, aldolase*, muscle enzyme*",
    ),
    (
        "inflammatory_markers",
        "crp, hscrp, c reactive*, creactive*, esr, sed rate, erythrocyte sed*, sedimentation*, procalcitonin*, "
        "inflammatory marker*, inflammation marker*, inflammatory panel, interleukin*, il 6, plasma viscosit*, "
        "acute phase*",
    ),
    (
        "iron_and_vitamins",
        "iron*, ferritin*, tibc, uibc, transferrin*, folate*, folic*, b12, cobalamin*, vit, vitamin*, 25 oh*, "
        "25 hydroxy*, 1 25 di*, calcidiol*, thiamin*, pyridoxine, niacin*, riboflavin*, zinc, copper, selenium, "
        "methylmalon*, mma, homocystein*, retinol*, carotene*, micronutrient*, nutritional*",
    ),
    (
        "glucose_and_lipids",
        "glucose*, glu, hba1c*, a1c, hb a1c, hemoglobin a1c, glycated*, glycosylated*, glycohemo*, glycemi*, "
        "hemoglobin a 1c, ogtt, gtt, fbs, fbg, rbs, rbg, bsl, bgl, ppbs, bm, blood sugar*, sugar, lipid*, "
        "cholesterol*, ldl*, hdl*, triglycerid*, tg, finger stick*, fingerstick*, accucheck, glucometer*, "
        "fructosamine*, ketone*, hydroxybutyrate*, apolipo*, lipoprotein*, random blood sug*",
    ),
    (
        "liver_function",
        "lft, liver*, hepatic*, alt, ast, alp, sgpt, sgot, ggt, gamma glut*, gammagt, bilirubin*, tbil, "
        "albumin*, alk phos*, alkaline phos*, transaminas*, aminotransferas*, ammonia*, amylase*, lipase*, "
        "bile acid*, pancreatic enzyme*",
    ),
    (
        "electrolytes_and_renal_function",
        "u&e*, ue, ues, uec, u and e, urea*, bun, creatinin*, creat, cr, electrolyte*, lyte*, sodium*, na, na+, "
        "potassium*, k, k+, chlorid*, cl, cl-, bicarb*, hco3*, co2, tco2, calcium*, ca, ca2, ca2+, magnesium*, "
        "mg, phosph*, po4, renal*, kidney*, rft, kft, bmp, bmet, cmp, chem 7, chem7, chem 10, chem10, chem 12, "
        "chem 20, chem20, sma 7, smac, metabolic*, egfr, gfr, glomerular filtration*, cystatin*, uric*, urate*, "
        "osmolal*, osmolar*, anion gap, biochem*, blood chemistr*, chemistr*, serum chem*",
    ),
    (
        "full_blood_count",
        "cbc*, fbc*, fbe, full blood*, complete blood*, blood count*, blood cell count*, cell count*, hemogram*, "
        "hemoglobin*, hb, hgb, hematocrit*, hct, h&h, wbc*, wcc, white blood*, white cell*, white count*, "
        "leukocyt*, leucocyt*, rbc*, red blood cell*, red cell*, platelet*, plt, neutrophil*, anc, corpuscular*, "
        "eosinophil*, lymphocyt*, monocyt*, basophil*, differential count, total count, mcv, mch*, rdw, "
        "erythrocyt*, hematolog*",
    ),
    (
        "bedside_and_functional_tests",
        "hallpike, tilt table, tilt test, orthostatic*, postural blood*, lying and standing*, mini mental*, "
        "mmse, mini cog, moca, phq*, epds, edinburgh*, audit c, psycholog*, psychometr*, neuropsych*, "
        "cognitive*, mental status*, questionnaire*, visual acuity, snellen*, vision*, visual field*, perimetr*, "
        "tonometr*, intraocular*, slit lamp*, fluorescein*, fundoscop*, funduscop*, fundus*, ophthalmoscop*, "
        "ophthalmolog*, optical coherence*, retinal photo*, dermoscop*, dermatoscop*, wood lamp, wood s lamp, "
        "audiometr*, audiolog*, audiogra*, hearing*, tympanometr*, otoacoustic*, rinne*, weber, otoscop*, abi, "
        "ankle brachial*, pulse ox*, oximetr*, oxygen saturation*, spo2, ambulatory blood pressure*, abpm, "
        "blood pressure*, post void residual, pvr, urodynamic*, uroflow*, manometr*, "
        "ph monitor*, ph impedance*, ph stud*, gastric emptying*, sweat*, schirmer*, edrophon*, tensilon*, "
        "ice pack*, food challenge*, provocation test*, semen*, sperm*, postcoital*, swallow*, glasgow*, gcs, "
        "nihss, straight leg*, phalen*, tinel*, finkelstein*, non stress*, nonstress*, nst, cardiotoco*, ctg, "
        "fetal*, apgar, gait*, nitrazine*, fern*, diary, diarie*, abdominal exam*, "
        "neurological exam*, scrotal exam*, cremasteric*, digital rectal*, mental state exam*, "
        "monofilament*, capnogra*, capillaroscop*, nailfold*, pelvic exam*, rectal exam*, "
        "bishop*, screening tool*, screening questionnair*, developmental screen*, transilluminat*, epley*, "
        "carotid massage*, valsalva*, romberg*, autonomic*, caloric test*, speech*, bioimpedance*, skinfold*",
    ),
)
# Panels that span categories: a name that has such a phrase orders all of them; the first is its category.
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cmp, comprehensive metabolic*, complete metabolic*", ("electrolytes_and_renal_function", "liver_function")),
    ("blood and urine culture*, urine and blood culture*", ("blood_culture", "urine_tests")),
)
_SPELLINGS = (
    ("\N{GREEK SMALL LETTER BETA}", "beta "),
    ("haem", "hem"),
    ("faec", "fec"),
    ("oesoph", "esoph"),
    ("oestr", "estr"),
    ("coeli", "celi"),
    ("tumour", "tumor"),
    ("leuco", "leuko"),
    ("foet", "fet"),
    ("paed", "ped"),
    ("caeru", "ceru"),
    ("calorie", "caloric"),
    ("thrombocyte", "platelet"),
)


def categorise(name: str) -> str:
    """The category of an examination by the name under which it is ordered, or "unknown".

    Case, underscores, hyphens, plural and British or American spelling do not matter; a category's own name is one.
    A name of something that is no single examination ("blood tests", "imaging", "vital signs") is unknown.
    """
    return (*categories(name), "unknown")[0]


@functools.lru_cache(maxsize=4096)
def categories(name: str) -> tuple[str, ...]:
    """All categories that a name orders: those of a panel, else one or none."""
    own = "_".join(re.findall(r"[a-z]+", name.lower()))
    if own in CATEGORIES:
        return (own,)
    plain = _level_spelling(name)
    for pattern, spanned in _panel_patterns():
        if pattern.search(plain):
            return spanned
    return next(((category,) for category, pattern in _patterns() if pattern.search(plain)), ())


def _level_spelling(text: str) -> str:
    """Lower-case words between single spaces, a space at both ends; no plural, American spelling."""
    text = text.lower()
    for british, american in _SPELLINGS:
        text = text.replace(british, american)
    text = re.sub(r"(?<=[a-z])\.(?=[a-z])|['\N{RIGHT SINGLE QUOTATION MARK}]", "", text)
    return " " + " ".join(_singular(word) for word in re.findall(r"[a-z0-9]+(?:&[a-z]+)?", text)) + " "


def _singular(word: str) -> str:
    """ "cultures" is culture; "pus", "ketosis" and "ges" stay."""
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _pattern(phrases: str) -> re.Pattern[str]:
    options = []
    for phrase in phrases.split(","):
        parts = phrase.strip().split()
        wild = [part.endswith("*") for part in parts]
        words = [
            re.escape(part.rstrip("*")) + r"\S*" if star else re.escape(_level_spelling(part).strip() or part)
            for part, star in zip(parts, wild, strict=True)
        ]
        options.append(" ".join(words))
    return re.compile("(?<= )(?:" + "|".join(options) + ")(?= )")


@functools.cache
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((category, _pattern(phrases)) for category, phrases in _RULES)


@functools.cache
def _panel_patterns() -> tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]:
    return tuple((_pattern(phrases), spanned) for phrases, spanned in _PANELS)
